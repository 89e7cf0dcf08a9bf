"""Decides what a row is, and how documents become rows.

A row is inputs, targets one token ahead, the targets that count, and their documents. Long documents are split or
cut, short ones may share a row (packing). A *piece* is a document or a part of one. A row is one piece, or with
packing several that stay apart: each piece of n tokens fills n - 1 input positions, so a target never lies in another
document and no position is wasted between two documents.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from mlx_empire.data.encode import Document
from mlx_empire.data.order import fixed_permutation

COUNTED_ROWS = 1024  # at once


@dataclass(frozen=True, eq=False)
class Table:
    """Flat arrays of one split: `tokens` (T,) int32; `counted` (T,) uint8, 1 where the token is a target that
    counts; `pieces` (P+1,) int64, offsets of the pieces in `tokens`; `rows` (R+1,) int64, offsets of the rows
    in `pieces`."""

    tokens: np.ndarray
    counted: np.ndarray
    pieces: np.ndarray
    rows: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Counts:
    """What happened to the documents of a split: read, cut short, dropped for want of a target."""

    documents: int
    cut: int
    dropped: int


def build_table(
    documents: Iterable[Document], sequence_length: int, splittable: bool, packing: bool
) -> tuple[Table | None, Counts]:
    """Lay documents out as rows of up to `sequence_length` input positions (one token more, the last target).

    A `splittable` document is split into pieces of `sequence_length` inputs, the next beginning with the last
    target of the one before; others are cut. Returns None for the table when not one target is left.
    """
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    read = cut = dropped = 0
    for document in documents:
        read += 1
        cut += not splittable and len(document.tokens) > sequence_length + 1
        pieces = list(pieces_of(document, sequence_length, splittable=splittable))
        dropped += not pieces
        kept.extend((tokens, counted) for _, tokens, counted in pieces)
    counts = Counts(read, cut, dropped)
    if not kept:
        return None, counts
    per_row = np.ones(len(kept), np.int64)
    if packing:
        order, per_row = packed_rows(np.array([len(tokens) for tokens, _ in kept]), sequence_length)
        kept = [kept[i] for i in order.tolist()]
    tokens, counted = (np.concatenate([piece[i] for piece in kept]) for i in (0, 1))
    return Table(tokens, counted, offsets_of([len(one) for one, _ in kept]), offsets_of(per_row)), counts


def pieces_of(
    document: Document, length: int, *, splittable: bool
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The pieces of a document that have a target: where each begins, its tokens and its flags."""
    for s in range(0, len(document.tokens), length) if splittable else (0,):
        counted = document.counted[s : s + length + 1].copy()
        counted[:1] = 0  # a piece's first token is an input only
        if counted.any():
            yield s, document.tokens[s : s + length + 1], counted


def offsets_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """(n+1,) int64: where each of so many elements begins, and where the last ends."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, dtype=np.int64, out=offsets[1:])
    return offsets


def packed_rows(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pieces share a row of `capacity` input positions: the pieces (n,) int64 row by row, by their places in
    `lengths` (n,) of tokens, and how many each row has (rows,) int64. Held on the way: up to 80 bytes a piece.

    Best fit, longest first: each piece goes to the open row that it leaves least room in. Equal lengths come in a
    fixed shuffled order, so that neighbours in the file (often alike) seldom share a row. An integer is the set of the
    free spaces that occur: its lowest bit at or above the need is the best fit, found without a search over rows.
    """
    lengths, order = np.asarray(lengths, np.int64), fixed_permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    row_of, below = array("q"), array("q")  # of each row the one that was left with as much room before it
    newest: dict[int, int] = {}  # free positions -> the last row that was left with them
    spaces = 0
    for index in order:
        need = int(lengths[index]) - 1
        fitting = spaces >> need
        if fitting:
            free = need + (fitting & -fitting).bit_length() - 1
            row = newest[free]
            newest[free] = below[row]
            if newest[free] < 0:
                spaces &= ~(1 << free)
        else:
            free, row = capacity, len(below)
            below.append(-1)
        row_of.append(row)
        left = free - need
        if left > 0:
            below[row] = newest[left] if spaces >> left & 1 else -1
            newest[left] = row
            spaces |= 1 << left
    rows = np.frombuffer(row_of, np.int64) if row_of else np.zeros(0, np.int64)
    return order[np.argsort(rows, kind="stable")], np.bincount(rows, minlength=len(below))


class Row(NamedTuple):
    """One row: four arrays (n,) with n input positions; int32, int32, uint8 (1: the target counts), int32."""

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    documents: np.ndarray


class Rows(Protocol):
    """The rows of a split, of one path or of several."""

    @property
    def parts(self) -> "Sequence[Dataset]":
        """The rows of each path; theirs follow one another."""
        ...

    @property
    def sequence_length(self) -> int:
        """How many input positions a row has at most."""
        ...

    @property
    def packed(self) -> bool:
        """Whether several documents may share a row."""
        ...

    @property
    def targets_per_row(self) -> np.ndarray:
        """(rows,) int64: how many targets of each row count."""
        ...

    @property
    def positions_per_row(self) -> np.ndarray:
        """(rows,) int64: how many input positions each row has, without padding."""
        ...

    @property
    def tokens_per_epoch(self) -> int:
        """Targets that count in one pass over all rows."""
        ...

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row:
        """Row `index`: of each piece, all tokens but the last are inputs, all but the first targets."""
        ...


@dataclass(frozen=True, eq=False)
class Dataset:
    """The rows of one split. The table's arrays may be memory maps of the cache."""

    table: Table
    sequence_length: int
    packed: bool

    def __len__(self) -> int:
        return len(self.table.rows) - 1

    @property
    def parts(self) -> "tuple[Dataset]":
        """Itself alone."""
        return (self,)

    @cached_property
    def targets_per_row(self) -> np.ndarray:
        """(rows,) int64: how many targets of each row count."""
        starts, found = self.table.pieces[self.table.rows], np.zeros(len(self), np.int64)
        for first in range(0, len(self), COUNTED_ROWS):  # numpy makes 8 bytes of each flag that it is given
            own = starts[first : first + COUNTED_ROWS + 1]
            flags = self.table.counted[own[0] : own[-1]]
            found[first : first + COUNTED_ROWS] = np.add.reduceat(flags, own[:-1] - own[0], dtype=np.int64)
        return found

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
        """As `Rows.row`."""
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


@dataclass(frozen=True, eq=False)
class Joined:
    """The rows of several paths, one after the other; their arrays stay where they are, in memory or mapped."""

    parts: tuple[Dataset, ...]

    def __len__(self) -> int:
        return int(self._offsets[-1])

    @property
    def sequence_length(self) -> int:
        """The same for all."""
        return self.parts[0].sequence_length

    @property
    def packed(self) -> bool:
        """The same for all."""
        return self.parts[0].packed

    @cached_property
    def targets_per_row(self) -> np.ndarray:
        """As `Rows.targets_per_row`."""
        return np.concatenate([part.targets_per_row for part in self.parts])

    @cached_property
    def positions_per_row(self) -> np.ndarray:
        """As `Rows.positions_per_row`."""
        return np.concatenate([part.positions_per_row for part in self.parts])

    @property
    def tokens_per_epoch(self) -> int:
        """As `Rows.tokens_per_epoch`."""
        return sum(part.tokens_per_epoch for part in self.parts)

    def row(self, index: int) -> Row:
        """As `Rows.row`."""
        part = int(np.searchsorted(self._offsets, index, side="right")) - 1
        return self.parts[part].row(index - int(self._offsets[part]))

    @cached_property
    def _offsets(self) -> np.ndarray:
        return offsets_of([len(part) for part in self.parts])


def join_rows(parts: Sequence[Dataset]) -> Rows:
    """The rows of these, one after the other; a lone one as it is."""
    return parts[0] if len(parts) == 1 else Joined(tuple(parts))
