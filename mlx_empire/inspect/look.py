"""Reads the splits of a data section and puts together what there is to tell of them.

Decides which rows are whose: a validation file's, or those that a run would hold out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mlx_empire.data.chat import Remarks
from mlx_empire.data.encode import check_tokenizer, load_tokenizer
from mlx_empire.data.files import Source, locate
from mlx_empire.data.row_format import detect_format
from mlx_empire.data.splits import end_held_out, held_out_rows, refuse_too_few
from mlx_empire.errors import UserError
from mlx_empire.formats.fetched import naming_the_fetch
from mlx_empire.inspect.findings import DataFinding, SplitRows, Variety, collapse, find, variety
from mlx_empire.inspect.texts import words
from mlx_empire.inspect.walk import Reading, SeenRows, Walk, beginning, texts_of_tokens
from mlx_empire.model.config import read_config
from mlx_empire.recipe.schema import Recipe

ROLE_WORDS = frozenset({"system", "user", "assistant", "human", "model", "developer"})
A_SENTENCE = 3  # words that no row has make a system prompt of what every row begins with

Tell = Callable[[int], None]
Telling = Callable[[str], Tell]  # what is counted, in words


@dataclass(frozen=True)
class Inspection:
    """What was found. `told`: what a run would say of the conversations; `begins`: the text that every row begins with,
    and how much of it only the chat template writes."""

    reading: Reading
    parts: Sequence[SplitRows]
    findings: Sequence[DataFinding]
    variety: Variety | None
    begins: tuple[str, str]
    told: Sequence[str]


def reading_of(recipe: Recipe, with_model: bool) -> tuple[Reading, Source, Source | None]:
    """How a run of the recipe reads its data, and the sources of its splits; without a model no tokens are made.

    Errors: UserError where there is nothing to read, or nothing to read it with.
    """
    data, folder = recipe.data, recipe.model.path
    path = data.only_path
    train, valid = locate(path)
    kind = detect_format(_first_row(train)) if data.format == "auto" else data.format
    tokenizer, vocabulary = None, None
    if with_model and (kind != "tokens" or (folder / "config.json").exists()):
        with naming_the_fetch(recipe):
            vocabulary = vocabulary_of(folder)
            if kind != "tokens":
                tokenizer = load_tokenizer(folder)
                check_tokenizer(kind, tokenizer, folder)
    fraction = 0.0 if valid is not None else data.validation_split or 0.0
    settings = (path, kind, data.sequence_length, data.packing, data.mask_prompt, fraction)
    return Reading(*settings, tokenizer, vocabulary), train, valid


def vocabulary_of(folder: Path) -> int | None:
    """Rows of the embedding, by the folder's configuration; None where that does not say."""
    config = read_config(folder)
    text = config.get("text_config")
    size = (text if isinstance(text, dict) else config).get("vocab_size")
    return size if isinstance(size, int) else None


def _first_row(train: Source) -> Any:
    first = next(train.rows(lambda where, error: None), None)
    if first is None:
        next(train.rows(), None)  # says what is wrong with its first line
        raise UserError(f"{train.path}: no rows; put at least one there")
    return first


def inspect_data(
    reading: Reading, train: Source, valid: Source | None, shown: int, measured: int
) -> Inspection:
    """Read all rows once, and tell what there is to tell. UserError where nothing can be read."""
    remarks = Remarks()
    with counting() as tell:
        seen = Walk(reading, shown, measured, remarks).over(train, tell("training rows"))
        if valid is not None:
            other = Walk(reading, shown, 0, remarks).over(valid, tell("validation rows"))
            parts = [
                SplitRows("train", seen, np.arange(len(seen.rows))),
                SplitRows("valid", other, np.arange(len(other.rows))),
            ]
        elif reading.validation_split and len(seen.rows):
            parts = _held_out(reading, seen, shown, measured)
        else:
            parts = [SplitRows("train", seen, np.arange(len(seen.rows)))]
    found, answers = find(reading, parts), variety(parts[0])
    found += [collapse(answers)] if answers is not None and answers.collapsed else []
    begins = beginning(parts[0].seen, reading)
    found += _hidden(begins[1], reading, len(parts[0].index))
    told = remarks.sentences(reading.tokenizer) if reading.tokenizer is not None else []
    return Inspection(reading, parts, found, answers, begins, told)


def _held_out(reading: Reading, seen: SeenRows, shown: int, measured: int) -> list[SplitRows]:
    """The splits of a source of which a part is held out, as a run chooses it."""
    fraction = reading.validation_split
    if len(seen.rows) == 1 and reading.splittable and seen.first is not None:
        document = seen.first[1]
        if document is None:  # a run holds its end out; where that begins only tokens tell
            return [SplitRows("train", seen, np.arange(1))]
        halves = end_held_out(document, reading.sequence_length, fraction)
        if halves is not None:
            found = []
            for name, half in zip(("train", "valid"), halves, strict=True):
                one = Walk(replace(reading, validation_split=0.0), shown, measured)
                one.take(half.where, texts_of_tokens(half), half, lambda: "")
                found.append(SplitRows(name, one.seen(), np.arange(1)))
            return found
    held = np.zeros(len(seen.rows), bool)
    refuse_too_few(len(seen.rows), fraction, reading.path)
    held[held_out_rows(len(seen.rows), fraction)] = True
    return [SplitRows(name, seen, np.flatnonzero(mask)) for name, mask in (("train", ~held), ("valid", held))]


def _hidden(written: str, reading: Reading, count: int) -> list[DataFinding]:
    """A system prompt that the chat template puts before every row."""
    if reading.tokenizer is None:
        return []
    for token in map(str, reading.tokenizer.added_tokens_decoder.values()):
        written = written.replace(token, " ")
    own = [word for word in words(written) if word not in ROLE_WORDS]
    if len(own) < A_SENTENCE:
        return []
    said = written.split()
    while said[0] in ROLE_WORDS:
        del said[0]
    while said[-1] in ROLE_WORDS:
        del said[-1]
    text = " ".join(said)
    sentence = f"every row begins with words that only the chat template has: {text[:200]!r}"
    return [DataFinding("hidden_prompt", "look", count, sentence)]


@contextmanager
def counting() -> Iterator[Telling]:
    """Around reading: `tell(what)` gives what shows a person on standard error how many there are so far."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.completed:,}"),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=console, transient=True)
    with bar if console.is_terminal else nullcontext():

        def tell(what: str) -> Tell:
            task = bar.add_task(what, total=None)
            return lambda count: bar.update(task, completed=count)

        yield tell
