"""How a model reads a few held-out rows: the probability that it gives to each token after those before it.

It is how one sees that a model learns which no machine can hold, let alone run: each evaluation streams these rows like
its own, and `samples.json` in the run's folder keeps the first reading beside the last. The rows are always the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_empire.comm.protocol import Communicator
from mlx_empire.data.batches import MicroBatch, validation_micro_batches
from mlx_empire.data.rows import Dataset
from mlx_empire.data.token_texts import Decode, token_texts
from mlx_empire.disk import replace_private

if TYPE_CHECKING:  # whoever looks at what was read needs no MLX
    from mlx_empire.engine.step import StreamedStep

FILE_NAME = "samples.json"
MOST_TOKENS = 400  # of a row that are shown


@dataclass(frozen=True)
class ReadRow:
    """One row: its tokens as text, the first of which nothing comes before, the probability of each (None for the
    first), and whether the loss counts it."""

    tokens: list[str]
    probabilities: list[float | None]
    counted: list[bool]


class RowReader:
    """Reads the first `rows` rows of the fixed order of `valid`. `decode`: tokens to text, on rank 0 alone."""

    def __init__(self, valid: Dataset, rows: int, decode: Decode | None) -> None:
        self._batches = list(validation_micro_batches(valid, 1, rows))
        lengths = [min(len(valid.row(batch.rows_read[0]).inputs), MOST_TOKENS) for batch in self._batches]
        # The rows are the same in every evaluation: what they say is found once.
        self._said = (
            []
            if decode is None
            else [_said(batch, length, decode) for batch, length in zip(self._batches, lengths, strict=True)]
        )

    def read(self, step: StreamedStep, comm: Communicator, per_rank: int) -> list[ReadRow]:
        """What the model makes of the rows; nothing but on rank 0. Collective."""
        found = token_probabilities(step, comm, self._batches, per_rank)
        if not self._said:
            return []
        return [
            ReadRow(tokens, [None, *(round(float(one), 4) for one in row[: len(tokens) - 1])], counted)
            for (tokens, counted), row in zip(self._said, found, strict=True)
        ]


def _said(batch: MicroBatch, length: int, decode: Decode) -> tuple[list[str], list[bool]]:
    """The text of the first `length` targets of a row and of what comes before them, and which of them count."""
    ids = [int(batch.inputs[0, 0]), *(int(one) for one in batch.targets[0, :length])]
    return token_texts(ids, decode), [False, *(bool(one) for one in batch.mask[0, :length])]


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
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError):
        return None
    return dict(found)
