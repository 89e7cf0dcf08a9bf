"""Decides what a row is: inputs, targets one token ahead, the targets that count, and their documents."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mlx_empire.data.rows import Table


class Row(NamedTuple):
    """One row: four arrays (n,) with n input positions; int32, int32, uint8 (1: the target counts), int32."""

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    documents: np.ndarray


@dataclass(frozen=True, eq=False)
class Dataset:
    """The rows of one split. The table's arrays may be memory maps of the cache."""

    table: Table
    sequence_length: int
    packed: bool

    def __len__(self) -> int:
        return len(self.table.rows) - 1

    @cached_property
    def targets_per_row(self) -> np.ndarray:
        """(rows,) int64: how many targets of each row count."""
        starts = self.table.pieces[self.table.rows[:-1]]
        return np.add.reduceat(self.table.counted, starts, dtype=np.int64)

    @cached_property
    def positions_per_row(self) -> np.ndarray:
        """(rows,) int64: how many input positions each row has, without padding."""
        tokens: np.ndarray = np.diff(self.table.pieces[self.table.rows])
        return tokens - np.diff(self.table.rows)

    @property
    def tokens_per_epoch(self) -> int:
        """Targets that count in one pass over all rows."""
        return int(self.targets_per_row.sum())

    @property
    def positions_per_epoch(self) -> int:
        """Input positions of one pass over all rows, without padding."""
        return len(self.table.tokens) - (len(self.table.pieces) - 1)

    def row(self, index: int) -> Row:
        """Row `index`: of each piece, all tokens but the last are inputs, all but the first targets."""
        first, last = self.table.rows[index], self.table.rows[index + 1]
        bounds = self.table.pieces[first : last + 1]
        start, end = bounds[0], bounds[-1]
        tokens = self.table.tokens[start:end]
        starts, ends = bounds[:-1] - start, bounds[1:] - start
        return Row(
            np.delete(tokens, ends - 1),
            np.delete(tokens, starts),
            np.delete(self.table.counted[start:end], starts),
            np.repeat(np.arange(len(starts), dtype=np.int32), ends - starts - 1),
        )
