"""What is shown is what is trained: rows, learnt tokens and positions are those that a run's own data has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.rows import FIXTURES, MODEL, chat

from mlx_empire.data.encode import load_tokenizer
from mlx_empire.data.splits import Splits, load_splits
from mlx_empire.data.token_texts import token_texts
from mlx_empire.inspect.look import inspect_data, reading_of
from mlx_empire.inspect.sample import FairSample
from mlx_empire.inspect.tokens import visible
from mlx_empire.recipe.load import load_recipe

RECIPE = f"""\
model: {{path: {MODEL}}}
data: {{path: PATH, sequence_length: 96}}
batch: {{global_size: 4}}
optimizer: {{learning_rate: 1.0e-3}}
run: {{dir: run, steps: 1ep}}
"""
PAIRS = [{"prompt": f"What is {n}?", "completion": f"It is {n}. " * (n % 7)} for n in range(1, 40)]
NUMBERS = [{"tokens": list(range(1, 2 + 37 * n % 90))} for n in range(1, 30)]
TEXTS = [{"text": "Once upon a time there was a cat. " * n} for n in range(1, 12)]
WORDNET = {
    f"set/{name}.jsonl": (FIXTURES / "wordnet" / f"{name}.jsonl").read_text().splitlines()[:16]
    for name in ("train", "valid")
}
CASES: dict[str, tuple[dict[str, list[Any]], list[str]]] = {
    "chat with a validation file": (WORDNET, []),
    "packed": (WORDNET, ["data.packing=true"]),
    "everything is learnt": (WORDNET, ["data.mask_prompt=false"]),
    "short rows": (WORDNET, ["data.sequence_length=40"]),
    "pairs, a part held out": ({"rows.jsonl": PAIRS}, ["data.validation_split=0.2", "data.packing=true"]),
    "texts in pieces": ({"rows.jsonl": TEXTS}, []),
    "one book, its end held out": (
        {"rows.jsonl": [{"text": "A cat. " * 300}]},
        ["data.validation_split=0.1"],
    ),
    "tokens": ({"rows.jsonl": NUMBERS}, ["data.sequence_length=16"]),
}


def recipe_for(path: Path, changes: list[str], tmp_path: Path) -> Path:
    file = tmp_path / "my.yaml"
    file.write_text(RECIPE.replace("PATH", str(path)))
    load_recipe(file, changes)
    return file


def as_a_run(file: Path, changes: list[str]) -> Splits:
    """The data as training has it."""
    data = load_recipe(file, changes).data
    return load_splits(
        path=data.path,
        sequence_length=data.sequence_length,
        format=data.format,
        packing=data.packing,
        mask_prompt=data.mask_prompt,
        validation_split=data.validation_split,
        tokenizer_folder=MODEL,
        vocab_size=512,
    )


@pytest.mark.parametrize("case", CASES)
def test_learnt_tokens_rows_and_positions_are_those_of_the_run(
    case: str, found: Callable[..., Any], write: Callable[..., Path], tmp_path: Path
) -> None:
    files, changes = CASES[case]
    written = [write(name, *rows) for name, rows in files.items()]
    path = written[0] if len(written) == 1 else written[0].parent
    file = recipe_for(path, changes, tmp_path)
    document, splits = found(file, *changes, "--rows", 500), as_a_run(file, changes)
    sets = {"train": splits.train, "valid": splits.valid}
    assert [part["name"] for part in document["parts"]] == [
        name for name, one in sets.items() if one is not None
    ]
    for part in document["parts"]:
        own = sets[part["name"]]
        assert own is not None
        assert part["learnt"] == own.tokens_per_epoch
        assert part["positions"] == own.positions_per_epoch
        assert part["trained_rows"] == len(own)
        shown = [row for row in document["shown"] if row["part"] == part["name"]]
        assert len(shown) == part["rows"]
        assert sum(row["learnt"] for row in shown) == own.tokens_per_epoch
        green = sum(state == "learnt" for row in shown for _, state in row["tokens"])
        more = any(row["count"] > len(row["tokens"]) for row in shown)
        assert green == own.tokens_per_epoch or (more and green < own.tokens_per_epoch)
    assert document["steps_per_epoch"] == len(splits.train) / 4


@pytest.mark.parametrize("case", ["chat with a validation file", "short rows", "everything is learnt"])
def test_each_learnt_token_is_a_target_of_the_run(
    case: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    files, changes = CASES[case]
    for name, rows in files.items():
        folder = write(name, *rows).parent
    file = recipe_for(folder, changes, tmp_path)
    reading, train, valid = reading_of(load_recipe(file, changes), with_model=True)
    parts = inspect_data(reading, train, valid, shown=500, measured=0).parts
    splits = as_a_run(file, changes)
    for part, own in zip(parts, (splits.train, splits.valid), strict=True):
        assert own is not None
        rows = [own.row(i) for i in range(len(own))]
        seen = [one for one in part.own(part.seen.shown) if one.learnt.any()]
        assert [one.tokens[one.learnt].tolist() for one in seen] == [
            row.targets[row.mask == 1].tolist() for row in rows
        ]
        assert [one.tokens[: one.kept - 1].tolist() for one in seen] == [row.inputs.tolist() for row in rows]


def test_the_rows_that_are_held_out_are_the_runs(
    found: Callable[..., Any], write: Callable[..., Path], tmp_path: Path
) -> None:
    """By their tokens: the first number of each row is its line."""
    path = write("rows.jsonl", *({"tokens": [n, 1, 2, 3]} for n in range(1, 31)))
    changes = ["data.validation_split=0.3"]
    file = recipe_for(path, changes, tmp_path)
    splits = as_a_run(file, changes)
    assert splits.valid is not None
    expected = {int(splits.valid.row(i).inputs[0]) for i in range(len(splits.valid))}
    shown = found(file, *changes, "--rows", 30)["shown"]
    assert {int(row["where"].rpartition(":")[2]) for row in shown if row["part"] == "valid"} == expected


def test_each_token_is_shown_as_it_stands_in_the_text(tmp_path: Path) -> None:
    """SentencePiece takes the blank off a token that is decoded alone; a character may take several tokens."""
    text = "Once upon a time, déjà vu — 猫 🐈 said\n\tmeow."
    own, in_bytes = load_tokenizer(MODEL), byte_tokenizer(tmp_path / "m", None, ("<e>",), ("<e>",), eos="<e>")
    for tokenizer in (own, in_bytes):
        ids = tokenizer.encode(text, add_special_tokens=False)
        texts = token_texts(ids, tokenizer.decode)
        assert len(texts) == len(ids)
        assert "".join(texts) == tokenizer.decode(ids)
    assert len(texts) == len(text.encode()), "a byte is a token"
    assert "".join(texts) == text
    assert texts[text.encode().index("猫".encode()) :][:3] == ["", "", "猫"]


def test_what_a_terminal_would_obey_is_spelled() -> None:
    assert visible("a\x1b[31m\u202eb\x00\ud800") == "a\\x1b[31m\\u202eb\\x00\\ud800"
    assert visible("a\n\tb\r\n") == "a⏎\n⇥b⏎\n"
    assert visible("") == "·"


def test_a_sample_is_fair_always_the_same_and_makes_nothing_that_is_not_kept() -> None:
    made: list[int] = []

    def drawn(count: int, size: int) -> list[int]:
        sample: FairSample[int] = FairSample(size)
        for place in range(count):
            sample.offer(place, lambda place=place: made.append(place) or place)  # type: ignore[misc]
        assert all(place == item for place, item in sample.items())
        return [place for place, _ in sample.items()]

    assert drawn(5, 10) == [0, 1, 2, 3, 4]
    made.clear()
    first = drawn(20_000, 400)
    assert first == sorted(first) == drawn(20_000, 400)
    assert first[0] == 0
    assert len(made) < 2 * 400 * (1 + np.log(20_000 / 400)) * 1.2, (
        "a place is kept for now with its chance of it"
    )
    tenths = np.bincount(np.array(first) * 10 // 20_000, minlength=10)
    assert tenths.min() > 15
    assert tenths.max() < 75, "40 are expected in each; five standard deviations"


def test_however_many_rows_there_are_few_of_them_are_kept_whole(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write("rows.jsonl", *({"tokens": [1 + n % 500] * 40} for n in range(1000)))
    file = recipe_for(path, [], tmp_path)
    reading, train, valid = reading_of(load_recipe(file), with_model=True)
    seen = inspect_data(reading, train, valid, shown=3, measured=5).parts[0].seen
    assert (len(seen.rows), len(seen.shown), len(seen.measured), len(seen.answers)) == (1000, 3, 5, 0)
    assert seen.rows.itemsize == 64


def test_long_rows_say_how_much_of_them_is_not_shown(
    found: Callable[..., Any], write: Callable[..., Path]
) -> None:
    write("rows.jsonl", chat("Count.", "one two three " * 1000))
    (row,) = found("rows.jsonl", "--model", MODEL, "data.sequence_length=4096")["shown"]
    assert len(row["tokens"]) == 1500 < row["count"]
    assert row["learnt"] > 1500
