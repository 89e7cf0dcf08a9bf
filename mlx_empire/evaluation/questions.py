"""Decides what the rows of an evaluation set must hold for its metrics, turns them into tokens, judges answers.

| metric                                          | a row has                                                       |
|-------------------------------------------------|-----------------------------------------------------------------|
| loss, perplexity, token_accuracy, exact_match   | what training data has; the answers' tokens count               |
| multiple_choice                                 | prompt (a text), choices (texts), answer (the right one's index); |
|                                                 | with a task what that benchmark's rows have (`tasks`)            |
| regular_expression, valid_json, json_schema     | prompt or messages; pattern or schema, unless the set has it     |
| scorer                                          | prompt or messages, and whatever the set's own function reads    |
| citation_coverage and others of `grounding`     | prompt or messages, sources and supports                         |

Questions are plain numbers and texts, so that rank 0 can read them for all. A row that is longer than
`data.sequence_length` is refused: half an answer has no score.

A regular expression must be found in the text (anchor it with ^ and $ for the whole). JSON is the whole text, blanks
around it aside. Schemas are checked by `jsonschema`, without fetching anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import jsonschema
import numpy as np

from mlx_empire.data.encode import (
    Document,
    check_tokenizer,
    encode_continuation,
    encode_prompt,
    encode_rows,
    load_tokenizer,
)
from mlx_empire.data.files import RawRow, locate
from mlx_empire.data.messages import standard_role
from mlx_empire.data.row_format import detect_format
from mlx_empire.errors import UserError
from mlx_empire.evaluation.grounding import Grounds, grounds_of
from mlx_empire.evaluation.tasks import Choices, choices_of
from mlx_empire.recipe.evaluation import CONSTRAINED, REFUSALS, EvaluationSet
from mlx_empire.recipe.text import words_of


def matches(text: str, pattern: str) -> bool:
    """Whether `pattern` is found in `text`."""
    return re.search(pattern, text) is not None


def is_json(text: str) -> bool:
    """Whether the whole text is one JSON value."""
    return _parsed(text) is not _BROKEN


def fits_schema(text: str, schema: Any) -> bool:
    """Whether the whole text is one JSON value that the schema allows."""
    value = _parsed(text)
    return value is not _BROKEN and schema_checker(schema, "schema")(value)


def schema_checker(schema: Any, where: str) -> Callable[[Any], bool]:
    """What says whether a value fits `schema`. UserError for a schema that is none."""
    try:
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
    except (jsonschema.SchemaError, AttributeError, TypeError) as error:
        reason = getattr(error, "message", str(error))
        raise UserError(f"{where}: not a JSON schema: {str(reason)[:120]}") from None
    return lambda value: bool(kind(schema).is_valid(value))


_BROKEN = object()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _BROKEN


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


CHOICE = "multiple_choice"


@dataclass(frozen=True)
class Answer:
    """A text whose answer is known: tokens, and which of them count (1) as targets."""

    tokens: list[int]
    counted: list[int]


@dataclass(frozen=True)
class Prompt:
    """Tokens to be continued, and what the continuation must match: a regular expression, a JSON schema or neither.

    `row`: all of the row, where the set's scorer reads it; `grounds`, and what a `refusal` looks like: where answers
    from sources are graded.
    """

    tokens: list[int]
    pattern: str | None = None
    schema: Any = None
    row: Any = None
    grounds: Grounds | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Questions:
    """One set: answers to be scored, choices (each question's alternatives and the right one), prompts.

    `constrained`: a grammar holds what is generated.
    """

    title: str
    metrics: tuple[str, ...]
    max_tokens: int
    constrained: bool = False
    answers: list[Answer] = field(default_factory=list)
    choices: list[tuple[list[Answer], int]] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)


def load_questions(
    asked: EvaluationSet, tokenizer_folder: Path, sequence_length: int, vocabulary: int
) -> Questions:
    """Read a set. UserError naming file, line and remedy."""
    source, _ = locate(asked.path)
    rows = list(source.rows())
    if not rows:
        raise UserError(f"evaluation.sets: {asked.path}: no rows; put at least one there")
    reader = _Reader(asked, tokenizer_folder, sequence_length, vocabulary)
    found = Questions(asked.title, asked.metrics, asked.max_tokens)
    if any(metric not in (CHOICE, *asked.generated) for metric in asked.metrics):
        found.answers.extend(reader.answers(rows))
    if CHOICE in asked.metrics:
        found.choices.extend(reader.choice(row) for row in rows)
    if asked.generates:
        found.prompts.extend(reader.prompt(row) for row in rows)
    if asked.grounded:
        _refuse_one_sided(asked, found.prompts)
    return found


def files_of_set(asked: EvaluationSet) -> list[Path]:
    """The files that decide a set's scores: its rows, a folder's too, the schema and the scorer's code. UserError."""
    source, _ = locate(asked.path)
    files = [*source.files, *([asked.json_schema] if asked.json_schema is not None else [])]
    return files + ([Path(asked.scorer.rpartition(":")[0])] if asked.scorer is not None else [])


def held(asked: EvaluationSet, free: Questions) -> Questions | None:
    """The constrained column beside the `free` one of a set; None where it has none."""
    title = f"{asked.title}.{CONSTRAINED}"
    if not asked.constrained:
        return None
    return Questions(title, asked.columns[title], free.max_tokens, True, prompts=free.prompts)


def _refuse_one_sided(asked: EvaluationSet, prompts: Sequence[Prompt]) -> None:
    """UserError where a metric of the set would look at no row whatever is answered."""
    kinds = {bool(prompt.grounds.supports) for prompt in prompts if prompt.grounds is not None}
    needed = {True, False} if any(metric in REFUSALS for metric in asked.metrics) else {True}
    if needed - kinds:
        missing = "whose supports name a source" if True not in kinds else "whose supports are []"
        raise UserError(
            f"evaluation.sets: {asked.path}: no row {missing}; {', '.join(asked.metrics)} need some"
        )


class _Reader:
    """Rows of one set, encoded as training data is."""

    def __init__(self, asked: EvaluationSet, folder: Path, sequence_length: int, vocabulary: int) -> None:
        self._asked, self._folder, self._length, self._vocabulary = asked, folder, sequence_length, vocabulary
        self._tokenizer: Any = None
        self._schema = _read_json(asked.json_schema) if asked.json_schema else None

    @property
    def tokenizer(self) -> Any:
        """The model's, loaded when it is needed first."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._folder)
        return self._tokenizer

    def answers(self, rows: Sequence[RawRow], kind: str | None = None) -> list[Answer]:
        """Rows whose answers are known, in order."""
        kind = kind or (detect_format(rows[0]) if self._asked.format == "auto" else self._asked.format)
        if kind != "tokens":
            check_tokenizer(kind, self.tokenizer, self._folder)
        tokenizer = None if kind == "tokens" else self.tokenizer
        documents = encode_rows(iter(rows), kind, tokenizer, True, self._vocabulary)
        return [self._answer(document) for document in documents]

    def choice(self, row: RawRow) -> tuple[list[Answer], int]:
        """The alternatives of a question, and the right one."""
        value = row.value
        if self._asked.task is not None:
            return self._of_task(row, choices_of(self._asked.task, row))
        prompt, choices, answer = value.get("prompt"), value.get("choices"), value.get("answer")
        if not isinstance(prompt, str) or not _texts(choices) or len(choices) < 2:
            raise UserError(f"{row.where}: {CHOICE} needs prompt (a text) and choices (two texts or more)")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise UserError(f"{row.where}: answer is {answer!r:.40}; it is the right choice's index, from 0")
        rows = [RawRow(row.where, {"prompt": prompt, "completion": choice}) for choice in choices]
        return self.answers(rows, "completions"), answer

    def _of_task(self, row: RawRow, found: Choices) -> tuple[list[Answer], int]:
        alternatives = []
        for context, choice in found.pairs:
            ids, before = encode_continuation(self.tokenizer, context, choice)
            flags = np.arange(len(ids)) >= before
            alternatives.append(
                self._answer(Document(row.where, np.array(ids, np.int32), flags.astype(np.uint8)))
            )
        return alternatives, found.right

    def prompt(self, row: RawRow) -> Prompt:
        """A row that is to be continued."""
        value = row.value
        messages = value.get("messages")
        if messages is None and isinstance(value.get("prompt"), str):
            messages = [{"role": "user", "content": value["prompt"]}]
        if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
            raise UserError(f"{row.where}: a row that is to be continued needs prompt or messages")
        if standard_role(str(messages[-1].get("role"))) == "assistant":
            messages = messages[:-1]
        pattern, schema = value.get("pattern", self._asked.pattern), value.get("schema", self._schema)
        self._check(row, pattern, schema)
        tokens = self._prompt_tokens(row, messages)
        if len(tokens) + self._asked.max_tokens > self._length + 1:
            raise UserError(
                f"{row.where}: {len(tokens)} tokens and max_tokens {self._asked.max_tokens} are more than "
                f"data.sequence_length {self._length}; raise that or lower max_tokens"
            )
        asked = self._asked
        grounds = grounds_of(row) if asked.grounded else None
        return Prompt(
            tokens, pattern, schema, None if asked.scorer is None else value, grounds, asked.refusal
        )

    def _prompt_tokens(self, row: RawRow, messages: list[Any]) -> list[int]:
        try:
            return encode_prompt(self.tokenizer, row, messages)
        except UserError:
            raise
        except Exception as error:  # templates raise what they like
            raise UserError(
                f"{row.where}: the chat template refuses this prompt ({words_of(error)})"
            ) from None

    def _check(self, row: RawRow, pattern: Any, schema: Any) -> None:
        if self._asked.refusal is not None:
            _refuse_broken_pattern(f"evaluation.sets: {self._asked.path}: refusal", self._asked.refusal)
        if "regular_expression" in self._asked.metrics:
            if not isinstance(pattern, str):
                raise UserError(f"{row.where}: regular_expression needs a pattern, in the row or in the set")
            _refuse_broken_pattern(f"{row.where}: pattern", pattern)
        if "json_schema" in self._asked.metrics:
            if schema is None:
                raise UserError(f"{row.where}: json_schema needs a schema, in the row or in the set")
            schema_checker(schema, row.where)

    def _answer(self, document: Document) -> Answer:
        if len(document.tokens) > self._length + 1:
            raise UserError(
                f"{document.where}: {len(document.tokens)} tokens are more than data.sequence_length {self._length}; "
                "raise it or shorten the row"
            )
        if not document.counted.any():
            raise UserError(f"{document.where}: no token of an answer is in this row")
        return Answer(document.tokens.tolist(), document.counted.tolist())


def _refuse_broken_pattern(where: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where} {pattern!r:.60} is no regular expression: {error}") from None


def _texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"evaluation.sets: schema {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"evaluation.sets: schema {path}: not valid JSON ({str(error)[:80]})") from None


def every_answer(sets: Sequence[Questions]) -> Iterator[Answer]:
    """All answers of all sets in the order in which they are scored: a set's own, then its choices'."""
    for one in sets:
        yield from one.answers
        for alternatives, _ in one.choices:
            yield from alternatives
