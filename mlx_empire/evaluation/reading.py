"""A few held-out rows as a model meets them: how it reads each token, and how it goes on after the row's prompt.

Reading, the probability of each token after those before it, is how one sees that a model learns which no machine can
hold, let alone run: each evaluation streams these rows like its own. Where machines can hold the model, it also writes.
`samples.json` in the run's folder keeps the first time beside the last. The rows are always the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlx_empire.comm.protocol import Communicator
from mlx_empire.data.batches import MicroBatch, validation_micro_batches
from mlx_empire.data.rows import Row, Rows
from mlx_empire.data.token_texts import Decode, token_texts
from mlx_empire.disk import replace_private

if TYPE_CHECKING:  # whoever looks at what was read needs no MLX
    from mlx_empire.engine.step import StreamedStep
    from mlx_empire.engine.trainer import Trainer

FILE_NAME = "samples.json"
MOST_TOKENS = 400  # of a row that are shown
MOST_WRITTEN = 64  # tokens after a prompt
PROMPT_OF_TEXT = 32  # tokens at most of a text that has no prompt


@dataclass(frozen=True)
class Continuation:
    """A row's prompt, what the model wrote after it, and what the row has there."""

    prompt: str
    written: str
    held_out: str


@dataclass(frozen=True)
class ReadRow:
    """One row: its tokens as text, the first of which nothing comes before, the probability of each (None for the
    first), whether the loss counts it, and what the model wrote, where it did."""

    tokens: list[str]
    probabilities: list[float | None]
    counted: list[bool]
    continued: Continuation | None = None


WRITTEN = {field.name for field in fields(Continuation)}


class RowReader:
    """Reads the first `rows` rows of the fixed order of `valid`. `decode`: tokens to text, on rank 0 alone; `ends`:
    tokens that end an answer, None where the model is not to write."""

    def __init__(
        self, valid: Rows, rows: int, decode: Decode | None, ends: Sequence[int] | None = None
    ) -> None:
        self._batches = list(validation_micro_batches(valid, 1, rows))
        self._rows = [valid.row(batch.rows_read[0]) for batch in self._batches]
        self._decode, self._ends, self._longest = decode, ends, valid.sequence_length
        # The rows are the same in every evaluation: what they say is found once.
        self._said = [] if decode is None else [_said(row, decode) for row in self._rows]

    def read(self, trainer: Trainer, comm: Communicator, per_rank: int) -> list[ReadRow]:
        """What the model makes of the rows; nothing but on rank 0. Collective."""
        found = token_probabilities(trainer.streamed, comm, self._batches, per_rank)
        written = [None] * len(self._rows) if self._ends is None else self._written(trainer, comm, self._ends)
        if (decode := self._decode) is None:
            return []
        return [
            ReadRow(
                said.tokens,
                [None, *(round(float(one), 4) for one in row[: len(said.tokens) - 1])],
                said.counted,
                None if ids is None else Continuation(said.prompt, decode(ids), said.held_out),
            )
            for said, row, ids in zip(self._said, found, written, strict=True)
        ]

    def _written(
        self, trainer: Trainer, comm: Communicator, ends: Sequence[int]
    ) -> Sequence[list[int] | None]:
        """The tokens after each row's prompt; no longer together than rows may be."""
        from mlx_empire.evaluation.generation import generate_each

        prompts = [split_at_prompt(row)[0] for row in self._rows]
        limits = [min(MOST_WRITTEN, self._longest + 1 - len(prompt)) for prompt in prompts]
        return generate_each(trainer, comm, prompts, limits, ends)


def split_at_prompt(row: Row) -> tuple[list[int], list[int]]:
    """The tokens of a row's first document up to the first that is learnt, and the rest of it.

    A text that is learnt from its beginning has no prompt: its first half is, at most `PROMPT_OF_TEXT` tokens.
    """
    length = int((row.documents == row.documents[0]).sum())
    tokens = [int(row.inputs[0]), *map(int, row.targets[:length])]
    learnt = next((place for place in range(length) if row.mask[place]), length)
    at = learnt + 1 if learnt else max(1, min(len(tokens) // 2, PROMPT_OF_TEXT))
    return tokens[:at], tokens[at:]


class _Said(NamedTuple):
    """What a row says: its tokens, which of them count, and its two parts around the end of the prompt."""

    tokens: list[str]
    counted: list[bool]
    prompt: str
    held_out: str


def _said(row: Row, decode: Decode) -> _Said:
    length = min(len(row.inputs), MOST_TOKENS)
    ids = [int(row.inputs[0]), *(int(one) for one in row.targets[:length])]
    prompt, rest = split_at_prompt(row)
    counted = [False, *(bool(one) for one in row.mask[:length])]
    return _Said(token_texts(ids, decode), counted, decode(prompt), decode(rest[:MOST_WRITTEN]))


def token_probabilities(
    step: StreamedStep, comm: Communicator, batches: Sequence[MicroBatch], per_rank: int
) -> list[np.ndarray]:
    """By micro-batch of one row, the probability of each target (width,). The same on every rank. Collective."""
    group = comm.size * per_rank
    found: list[np.ndarray] = []
    for first in range(0, len(batches), group):
        start = first + comm.rank * per_rank
        own = step.readings(batches[start : min(start + per_rank, len(batches))])
        flat = np.concatenate([np.empty(0), *(one.reshape(-1) for one in own)]).astype(np.float64)
        values = np.concatenate(comm.gather_arrays(flat))
        ends = np.cumsum([batch.inputs.size for batch in batches[first : first + group]])
        found += np.split(np.exp(values), ends[:-1])
    return found


def write_readings(folder: Path, step: int, readings: Sequence[ReadRow]) -> None:
    """Put a reading beside the run's first one. OSError."""
    now: dict[str, Any] = {"step": step, "texts": [asdict(one) for one in readings]}
    first = (read_readings(folder) or {}).get("first")
    if first is None or first["step"] >= step:
        first = now
    replace_private(folder / FILE_NAME, json.dumps({"first": first, "last": now}) + "\n")


def read_readings(folder: Path) -> dict[str, Any] | None:
    """What was written; None where there is nothing that can be understood."""
    try:
        found = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        for one in (found["first"], found["last"]):
            assert isinstance(one["step"], int)
            assert all(len(t["tokens"]) == len(t["probabilities"]) == len(t["counted"]) for t in one["texts"])
            assert all(t.get("continued") is None or t["continued"].keys() >= WRITTEN for t in one["texts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
        return None
    return dict(found)
