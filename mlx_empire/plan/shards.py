"""The ShardPlan: which rank owns which elements of every unit.

A unit's tensors lie in at most a few flat *segments* (one per kind and dtype): `trainable` tensors, `small` ones
that keep fp32 weights and states, and `frozen` ones. In a segment every tensor starts on a multiple of 64 elements
and gaps are zero. Each rank owns one interval of each segment, in proportion to its share, with edges on multiples
of 64, so that the optimizer's blocks never straddle two ranks. Intervals, not rows: no divisibility rule.

ZeRO stages differ only in residency: what a rank keeps whole and what it keeps as its interval.

| stage | weights  | gradients                        | optimizer state |
|-------|----------|----------------------------------|-----------------|
| 0     | whole    | whole                            | whole           |
| 1     | whole    | whole until the backward's end   | interval        |
| 2     | whole    | interval                         | interval        |
| 3     | interval | interval                         | interval        |
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

from mlx_empire.errors import UserError
from mlx_empire.model.spec import BLOCK, ITEM_BYTES, TensorSpec, UnitSpec

KINDS = ("trainable", "small", "frozen")
CHUNK_ELEMENTS = 1 << 21  # one optimizer call; bounds its temporaries
SHARED_ELEMENTS = 1 << 18  # small chunks up to so many elements together are evaluated at once
SQUARED_ELEMENTS = 1 << 22  # squared at once for the norm: few waits, and some megabytes


@dataclass(frozen=True)
class Placement:
    """A tensor's place in its segment; `start` in elements, a multiple of 64."""

    tensor: TensorSpec
    start: int


@dataclass(frozen=True)
class Chunk:
    """A run of rows of 64 elements of one tensor inside one rank's interval: what the optimizer updates at once.

    `start_row` counts from the segment's start, `first_row` from the tensor's; `tensor` is a stable id of the
    tensor (CRC-32 of its name), the same for every number of ranks.
    """

    name: str
    tensor: int
    start_row: int
    first_row: int
    rows: int


class RowRun(NamedTuple):
    """`times` chunks of `rows` rows, one behind the other in one tensor; `row`: the first, from the segment's start."""

    placement: Placement
    row: int
    rows: int
    times: int


@dataclass(frozen=True)
class Segment:
    """One flat buffer of a unit: tensors of one kind and dtype, and the edges of the ranks' intervals (elements)."""

    kind: str
    dtype: str
    placements: tuple[Placement, ...]
    size: int
    edges: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of one element as stored and as gathered."""
        return ITEM_BYTES[self.dtype]

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Of each tensor, with its padding; one lies behind the other."""
        return tuple(p.tensor.padded_size // BLOCK for p in self.placements)

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max(p.tensor.size for p in self.placements) * self.itemsize

    @cached_property
    def has_adapters(self) -> bool:
        """Whether adapters are among its tensors."""
        return any(".lora_" in p.tensor.name for p in self.placements)

    def interval(self, rank: int) -> tuple[int, int]:
        """The elements that `rank` owns, half open."""
        return self.edges[rank], self.edges[rank + 1]

    def chunks(self, start: int, stop: int) -> Iterator[Chunk]:
        """Cut the interval [start, stop) into chunks that lie in one tensor each."""
        for run in self.runs(start, stop):
            name, first = run.placement.tensor.name, run.placement.start // BLOCK
            for row in range(run.row, run.row + run.rows * run.times, run.rows):
                yield Chunk(name, zlib.crc32(name.encode()), row, row - first, run.rows)

    def runs(self, start: int, stop: int) -> Iterator[RowRun]:
        """The chunks of [start, stop) in order, those of one size in a tensor together.

        Cuts are counted from a tensor's first row, so a chunk's borders inside a tensor do not depend on the shares
        except where an interval ends.
        """
        for index, row, rows, times in runs_of(self.rows, start, stop):
            yield RowRun(self.placements[index], row, rows, times)


def runs_of(rows: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """(tensor's index, first row, rows of a chunk, chunks) of `Segment.runs`, where tensors have so many `rows`."""
    full, first = CHUNK_ELEMENTS // BLOCK, 0
    for index, count in enumerate(rows):
        row, end = max(first, start // BLOCK), min(first + count, stop // BLOCK)
        if row < end:
            begun = min(-(row - first) % full, end - row)  # up to the next cut
            whole, rest = divmod(end - row - begun, full)
            for size, times in ((begun, 1), (full, whole), (rest, 1)):
                if size and times:
                    yield index, row, size, times
                    row += size * times
        first += count


@dataclass(frozen=True)
class Unit:
    """A unit with its segments; `index` 0 is the root."""

    index: int
    name: str
    segments: tuple[Segment, ...]

    @property
    def gathered_bytes(self) -> int:
        """Bytes of the whole unit when gathered."""
        return sum(s.size * s.itemsize for s in self.segments)


@dataclass(frozen=True)
class UnitSizes:
    """What a unit weighs on one rank, in bytes but for `trained`.

    `gathered`: the whole unit; `gradient`: the whole gradient in the wire's dtype; `largest`: that of its largest
    tensor; `kept`: the weights that stay between steps, of them `adapters`; `trained`: elements whose state is here.
    """

    gathered: int
    gradient: int
    largest: int
    kept: int
    adapters: int
    trained: int


@dataclass(frozen=True)
class ShardPlan:
    """Units, shares (one per rank, sum 1) and the ZeRO stage; every consumer derives its layout from this."""

    units: tuple[Unit, ...]
    shares: tuple[float, ...]
    zero_stage: int

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.shares)

    @cached_property
    def trained(self) -> tuple[bool, ...]:
        """By unit, whether anything of it trains."""
        return tuple(any(s.kind != "frozen" for s in u.segments) for u in self.units)

    @cached_property
    def tensors(self) -> dict[str, tuple[int, int, Placement]]:
        """Name of each tensor -> (unit index, segment index, placement)."""
        return {
            p.tensor.name: (u.index, s, p)
            for u in self.units
            for s, segment in enumerate(u.segments)
            for p in segment.placements
        }

    @cached_property
    def sizes(self) -> tuple[tuple[UnitSizes, ...], ...]:
        """Indexed by rank and unit."""
        return tuple(tuple(self._unit_sizes(u, r) for u in self.units) for r in range(self.world_size))

    def _unit_sizes(self, unit: Unit, rank: int) -> UnitSizes:
        gradient = largest = kept = adapters = trained = 0
        for segment in unit.segments:
            a, b = self.weights_interval(segment, rank)
            kept += (b - a) * segment.itemsize
            if segment.kind == "frozen":
                continue
            gradient += segment.size * segment.itemsize
            largest = max(largest, segment.largest)
            if segment.has_adapters:
                adapters += (b - a) * segment.itemsize
            a, b = self.state_interval(segment, rank)
            trained += b - a
        return UnitSizes(unit.gathered_bytes, gradient, largest, kept, adapters, trained)

    def weights_interval(self, segment: Segment, rank: int) -> tuple[int, int]:
        """The elements of a segment's weights that stay on `rank` between steps."""
        return segment.interval(rank) if self.zero_stage == 3 else (0, segment.size)

    def state_interval(self, segment: Segment, rank: int) -> tuple[int, int]:
        """The elements whose optimizer state (and finished gradient) stays on `rank`."""
        return segment.interval(rank) if self.zero_stage >= 1 else (0, segment.size)

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` is its inverse."""
        return json.dumps(asdict(self), indent=None, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ShardPlan:
        """Read a plan written by `to_json`."""
        raw = json.loads(text)
        return cls(tuple(_unit(u) for u in raw["units"]), tuple(raw["shares"]), raw["zero_stage"])


def make_plan(units: Sequence[UnitSpec], shares: Sequence[float], zero_stage: int) -> ShardPlan:
    """Lay out every unit and cut it by `shares` (any non-negative weights, one per rank; they are normalised)."""
    total = float(sum(shares))
    if not shares or min(shares) < 0 or total <= 0:
        raise UserError(
            f"memory.shares: {list(shares)}: needs one non-negative weight per rank, not all zero"
        )
    if zero_stage not in (0, 1, 2, 3):
        raise UserError(f"memory.zero_stage: {zero_stage}: must be 0, 1, 2, 3 or auto")
    normal = tuple(s / total for s in shares)
    laid = tuple(Unit(i, u.name, tuple(_segments(u, normal))) for i, u in enumerate(units))
    return ShardPlan(laid, normal, zero_stage)


def cut(size: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Edges of the ranks' intervals of `size` elements: cumulative shares rounded to whole blocks of 64."""
    blocks = size // BLOCK
    edges, cumulative = [0], 0.0
    for share in shares[:-1]:
        cumulative += share
        edges.append(min(max(edges[-1], int(blocks * cumulative + 0.5) * BLOCK), blocks * BLOCK))
    return (*edges, size)


def _segments(unit: UnitSpec, shares: Sequence[float]) -> Iterator[Segment]:
    groups: dict[tuple[str, str], list[TensorSpec]] = {}
    for tensor in unit.tensors:
        dtype = "float32" if tensor.kind == "small" else tensor.dtype
        groups.setdefault((tensor.kind, dtype), []).append(tensor)
    for kind, dtype in sorted(groups, key=lambda g: (KINDS.index(g[0]), g[1])):
        placements, start = [], 0
        for tensor in groups[kind, dtype]:
            placements.append(Placement(tensor, start))
            start += tensor.padded_size
        yield Segment(kind, dtype, tuple(placements), start, cut(start, shares))


def _unit(raw: dict[str, Any]) -> Unit:
    segments = []
    for s in raw["segments"]:
        placements = tuple(
            Placement(TensorSpec(**{**p["tensor"], "shape": tuple(p["tensor"]["shape"])}), p["start"])
            for p in s["placements"]
        )
        segments.append(Segment(s["kind"], s["dtype"], placements, s["size"], tuple(s["edges"])))
    return Unit(raw["index"], raw["name"], tuple(segments))
