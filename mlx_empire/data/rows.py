"""Decides how documents become rows: long ones are split or cut, short ones may share a row (packing).

A *piece* is a document or a part of one. A row is one piece, or with packing several that stay apart: each
piece of n tokens fills n - 1 input positions, so a target never lies in another document and no position is
wasted between two documents.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np

from mlx_empire.data.encode import Document
from mlx_empire.data.order import fixed_permutation


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
        pieces = [piece for piece in _pieces(document, sequence_length, splittable) if piece[1][1:].any()]
        dropped += not pieces
        kept.extend(pieces)
    counts = Counts(read, cut, dropped)
    if not kept:
        return None, counts
    if packing:
        kept, per_row = _pack(kept, sequence_length)
    else:
        per_row = [1] * len(kept)
    counted = np.concatenate([flags for _, flags in kept])
    offsets = _offsets([len(tokens) for tokens, _ in kept])
    counted[offsets[:-1]] = 0  # a piece's first token is an input only
    return Table(np.concatenate([tokens for tokens, _ in kept]), counted, offsets, _offsets(per_row)), counts


def _pieces(document: Document, length: int, splittable: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    starts = range(0, len(document.tokens), length) if splittable else (0,)
    return [(document.tokens[s : s + length + 1], document.counted[s : s + length + 1]) for s in starts]


def _offsets(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _pack(
    pieces: list[tuple[np.ndarray, np.ndarray]], capacity: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[int]]:
    """Best fit, longest first: each piece goes to the open row that it leaves least room in.

    Equal lengths come in a fixed shuffled order, so that neighbours in the file (often alike) seldom share a
    row. An integer is the set of the free spaces that occur: its lowest bit at or above the need is the best
    fit, found without a search over rows.
    """
    shuffled = fixed_permutation(len(pieces)).tolist()
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free positions -> rows that have them
    spaces = 0
    for index in sorted(shuffled, key=lambda i: -len(pieces[i][0])):
        need = len(pieces[index][0]) - 1
        fitting = spaces >> need
        if fitting:
            free = need + (fitting & -fitting).bit_length() - 1
            row = open_rows[free].pop()
            if not open_rows[free]:
                spaces &= ~(1 << free)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        left = free - need
        if left > 0:
            open_rows.setdefault(left, []).append(row)
            spaces |= 1 << left
    return [pieces[index] for row in rows for index in row], [len(row) for row in rows]
