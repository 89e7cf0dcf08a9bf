"""Decides the global gradient norm, to the last bit the same for any number of ranks and any shares.

Three fixed levels, counted from the start of each segment:

1. block:  the squares of 64 elements are added in float32 in a fixed tree (`block_sums`, on the device);
2. chunk:  16,384 block sums (2^20 elements) are added in float64 in a fixed tree, on the host;
3. total:  the chunk sums of all segments are added one after the other, in float64.

Exchange. A rank adds up the chunks that lie wholly in its intervals; of a chunk that straddles ranks each
sends its block sums. All segments travel in two arrays per rank: float64 chunk sums and float32 block sums,
in the order of segments and rows (`NormPartials.packed`). Their lengths follow from the layout
(`NormLayout.lengths`), so they need no header. `NormLayout.combine` puts them together, alike on every
rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

import mlx.core as mx
import numpy as np

from mlx_empire.model.spec import BLOCK
from mlx_empire.plan.shards import SQUARED_ELEMENTS, ShardPlan, Unit

CHUNK_ROWS = (1 << 20) // BLOCK
PIECE_ROWS = SQUARED_ELEMENTS // BLOCK


@dataclass(frozen=True)
class GradientNorm:
    """The norm, and the segments (indices) whose sum is not finite: inf or nan gradients, or overflow."""

    value: float
    bad_segments: tuple[int, ...]


def block_sums(*gradients: mx.array) -> list[np.ndarray]:
    """For each of `gradients` (rows, 64), float32 or bfloat16: float32 (rows,), the sums of squares of its rows.

    Evaluated piece by piece: together MLX would hold the squares of twenty and more at once.
    """
    found = [piece_sums(gradient) for gradient in gradients]
    for piece in (piece for pieces in found for piece in pieces):
        mx.eval(piece)
    return [on_host(pieces) for pieces in found]


def piece_sums(gradient: mx.array) -> list[mx.array]:
    """The same of one gradient, lazily and in pieces (rows, 1); `on_host` puts them together once evaluated."""
    rows = range(0, gradient.shape[0], PIECE_ROWS)
    return [_piece_sums(gradient[row : row + PIECE_ROWS]) for row in rows]


def on_host(pieces: Sequence[mx.array]) -> np.ndarray:
    """The block sums of one gradient as one array (rows,)."""
    return np.concatenate([np.zeros(0, np.float32), *(np.array(p, copy=False)[:, 0] for p in pieces)])


def clip_scale(norm: float, clip_norm: float | None) -> float:
    """What gradients are multiplied by so that their norm is at most `clip_norm` (None: no clipping)."""
    return 1.0 if clip_norm is None or norm <= clip_norm else clip_norm / norm


@dataclass(frozen=True)
class NormLayout:
    """Who owns which rows: for each segment the ranks' edges in rows, ranks + 1 of them, from 0 on."""

    edges: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, plan: ShardPlan) -> NormLayout:
        """The layout of a plan's trained segments, in the order of units and segments, frozen ones left out.

        At stage 0 every rank has all gradients; each still counts only its own interval.
        """
        return cls.of_units(plan.units)

    @classmethod
    def of_units(cls, units: Iterable[Unit]) -> NormLayout:
        """The layout of some units' trained segments; without one it has no edges and no size."""
        segments = [s for unit in units for s in unit.segments if s.kind != "frozen"]
        return cls(tuple(tuple(edge // BLOCK for edge in s.edges) for s in segments))

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.edges[0]) - 1

    def interval(self, segment: int, rank: int) -> tuple[int, int]:
        """The rows of `segment` that `rank` counts, half open."""
        return self.edges[segment][rank], self.edges[segment][rank + 1]

    def lengths(self, rank: int) -> tuple[int, int]:
        """Elements of the two arrays that `rank` sends: float64 chunk sums, float32 block sums."""
        segments = range(len(self.edges))
        chunks = sum(len(self.whole_chunks(s, rank)) for s in segments)
        return chunks, sum(rows for s in segments for _, rows in self._straddling(s, rank))

    def whole_chunks(self, segment: int, rank: int) -> range:
        """The chunks of `segment` that lie wholly in the rows of `rank`; the last may be short."""
        first, last = self.interval(segment, rank)
        stop = last // CHUNK_ROWS if last < self.edges[segment][-1] else -(-last // CHUNK_ROWS)
        return range(-(-first // CHUNK_ROWS), stop)

    def _straddling(self, segment: int, rank: int) -> list[tuple[int, int]]:
        """(chunk, own rows) of the chunks that `rank` has in part: at most its first and its last."""
        first, last = self.interval(segment, rank)
        if first == last:
            return []
        chunks = sorted({first // CHUNK_ROWS, (last - 1) // CHUNK_ROWS})
        whole = self.whole_chunks(segment, rank)
        spans = [(c, max(first, c * CHUNK_ROWS), min(last, (c + 1) * CHUNK_ROWS)) for c in chunks]
        return [(c, b - a) for c, a, b in spans if c not in whole]

    def combine(self, packed: Sequence[tuple[np.ndarray, np.ndarray]]) -> GradientNorm:
        """The norm from what every rank packed, in rank order."""
        arrays = [(sums.astype(np.float64), blocks.astype(np.float32)) for sums, blocks in packed]
        assert [(a.size, b.size) for a, b in arrays] == [self.lengths(r) for r in range(self.world_size)]
        values = []
        for segment, edges in enumerate(self.edges):
            sums = np.zeros(-(-edges[-1] // CHUNK_ROWS))
            parts: dict[int, list[np.ndarray]] = {}
            for rank, (chunk_sums, blocks) in enumerate(arrays):
                whole = self.whole_chunks(segment, rank)
                sums[whole.start : whole.start + len(whole)] = chunk_sums[: len(whole)]
                for chunk, rows in self._straddling(segment, rank):
                    parts.setdefault(chunk, []).append(blocks[:rows])
                    blocks = blocks[rows:]
                arrays[rank] = (chunk_sums[len(whole) :], blocks)
            for chunk, pieces in parts.items():
                sums[chunk] = _chunk_sum(np.concatenate(pieces))
            values.append(sums)
        bad = tuple(i for i, sums in enumerate(values) if not np.isfinite(sums).all())
        # cumsum adds one after the other; sum() would not (and differs between versions of Python).
        total = float(np.cumsum(np.concatenate([np.zeros(1), *values]))[-1])
        return GradientNorm(sqrt(total), bad)


class NormPartials:
    """One rank's part of one step's norm, gathered while gradients become complete."""

    def __init__(self, layout: NormLayout, rank: int) -> None:
        self._layout, self._rank = layout, rank
        segments = range(len(layout.edges))
        self._row = [layout.interval(s, rank)[0] for s in segments]
        self._sums: list[list[float]] = [[] for _ in segments]
        self._blocks: list[list[np.ndarray]] = [[] for _ in segments]
        self._open: list[list[np.ndarray]] = [[] for _ in segments]  # pieces of a whole chunk so far

    def add(self, segment: int, sums: np.ndarray) -> None:
        """The next block sums of `segment`, in the order of rows from the start of this rank's interval.

        Segments may come in any order and in pieces of any length.
        """
        whole = self._layout.whole_chunks(segment, self._rank)
        _, last = self._layout.interval(segment, self._rank)
        while sums.size:
            row = self._row[segment]
            chunk = row // CHUNK_ROWS
            end = min((chunk + 1) * CHUNK_ROWS, last)
            assert row < end, "more rows than this rank owns"
            piece, sums = sums[: end - row], sums[end - row :]
            self._row[segment] = row + piece.size
            if chunk not in whole:
                self._blocks[segment].append(piece)
                continue
            self._open[segment].append(piece)
            if self._row[segment] == end:
                self._sums[segment].append(_chunk_sum(np.concatenate(self._open[segment])))
                self._open[segment] = []

    def packed(self) -> tuple[np.ndarray, np.ndarray]:
        """(float64 chunk sums, float32 block sums) of all segments, each of `NormLayout.lengths` elements."""
        ends = [self._layout.interval(s, self._rank)[1] for s in range(len(self._row))]
        assert self._row == ends, "block sums are missing"
        blocks = [piece for pieces in self._blocks for piece in pieces]
        sums = [value for values in self._sums for value in values]
        return np.array(sums, np.float64), np.concatenate([np.zeros(0, np.float32), *blocks])


def _piece_sums(piece: mx.array) -> mx.array:
    # A tree of our own: how `mx.sum` groups its terms may depend on the shape and on the device.
    sums = mx.square(piece.astype(mx.float32))
    while (half := sums.shape[1] // 2) > 0:
        sums = sums[:, :half] + sums[:, half:]
    return sums


def _chunk_sum(blocks: np.ndarray) -> float:
    """Sum of up to CHUNK_ROWS float32 values in float64, in a tree that depends on their places alone."""
    sums = np.zeros(CHUNK_ROWS)
    sums[: blocks.size] = blocks
    while sums.size > 1:
        half = sums.size // 2
        sums = sums[:half] + sums[half:]
    return float(sums[0])
