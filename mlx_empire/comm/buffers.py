"""Flat buffers: evaluated MLX arrays seen as numpy arrays without copying, and a reduce-scatter's arithmetic on them.

Views are the form in which bytes cross the network. numpy has no bfloat16, so those are seen as uint16. The views are
writable: MPI receives straight into MLX memory. Of what is being evaluated any one thread may make them, which waits
for it; what nobody has asked for yet is evaluated by the main thread (MLX streams belong to threads).

The arithmetic (packing and fp32 additions over buffers with gaps) decides the order of additions within an element
(that of the ranks) and nothing else; no communication here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_empire.comm.protocol import Array, Pieces, Wire
from mlx_empire.model.spec import BLOCK
from mlx_empire.plan.traffic import ADDED_AT_ONCE

DTYPES = {
    "bfloat16": mx.bfloat16,
    "float32": mx.float32,
    "float16": mx.float16,
    "uint32": mx.uint32,
    "uint8": mx.uint8,
}


def empty_rows(
    wanted: Sequence[tuple[int, str]], evaluate: Callable[[list[mx.array]], None] = mx.eval
) -> list[mx.array]:
    """For each (elements, dtype) an uninitialised buffer of shape (elements / 64, 64), evaluated together.

    Rows, so that no dimension passes 32 bits.
    """
    buffers = [mx.empty((elements // BLOCK, BLOCK), DTYPES[dtype]) for elements, dtype in wanted]
    evaluate(buffers)
    return buffers


def host_view(array: mx.array) -> np.ndarray:
    """The flat numpy view of a contiguous array's memory; bfloat16 is seen as uint16. Evaluates the array,
    or waits for its evaluation.

    No node is added to a graph, so an array that is evaluated costs no evaluation. BufferError for one whose elements
    do not follow one another.
    """
    if array.dtype != mx.bfloat16:
        return np.array(array, copy=False).reshape(-1)
    memory: Any = array  # numpy does not know bfloat16: it is given the bytes, through the buffer protocol
    view: np.ndarray = np.frombuffer(memory, np.uint16)
    return view


WIRE_DTYPES: dict[Wire, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.float16),
}
SHARED_AMONG_THREADS = 1 << 20  # elements of a total from which several threads add
ADDED_BESIDE = 1 << 14  # elements of a piece from which it is added beside the exchange
ADDERS = 8  # threads at most: the memory's bandwidth is then used up


def check_buffer(buffer: Array, edges: Sequence[int], size: int) -> None:
    """Assert that a flat buffer is whole, contiguous and divided among `size` ranks."""
    assert len(edges) == size + 1, f"edges {list(edges)} for {size} ranks"
    assert edges[0] == 0, "edges start at 0"
    assert buffer.shape == (edges[-1],), f"buffer: 1-D, {edges[-1]} elements"
    assert buffer.flags.c_contiguous, "buffer: contiguous"


def check_reduction(
    rank: int,
    pieces: Pieces,
    edges: Sequence[int],
    total: Array | None,
    contributes: Sequence[bool],
    wire: Wire,
) -> Array:
    """Assert that the arguments of a reduce-scatter fit one another; returns the total, an empty one for
    None."""
    low, high = edges[rank], edges[rank + 1]
    total = np.empty(0, np.float32) if total is None else total
    assert len(edges) == len(contributes) + 1, f"edges {list(edges)}, {len(contributes)} flags"
    assert total.dtype == np.float32, f"total: float32, not {total.dtype}"
    assert total.shape == (high - low,), f"total: 1-D, {high - low} elements"
    if contributes[rank]:
        end = 0
        for start, values in pieces:
            assert values.ndim == 1, "a piece is 1-D"
            assert values.flags.c_contiguous, "a piece is contiguous"
            assert values.dtype == WIRE_DTYPES[wire], f"piece of {values.dtype} on a {wire} wire"
            assert start >= end, "pieces must ascend without overlap"
            end = start + values.size
        assert end <= edges[-1], f"pieces end at {end}, the buffer at {edges[-1]}"
    return total


def overlaps(pieces: Pieces, low: int, high: int) -> Iterator[tuple[int, Array]]:
    """The parts of the pieces within [low, high), as (offset from low, view)."""
    for start, values in pieces:
        first, last = max(start, low), min(start + values.size, high)
        if first < last:
            yield first - low, values[first - start : last - start]


def window(pieces: Pieces, low: int, high: int) -> Array | None:
    """[low, high) as a view, where a single piece covers it; else None: it has to be packed."""
    offset, part = next(overlaps(pieces, low, high), (0, None))
    return part if part is not None and offset == 0 and part.size == high - low else None


def copy_interval(pieces: Pieces, low: int, high: int, out: Array) -> Array:
    """Copy [low, high) into `out` (same dtype, high - low elements), zeros in the gaps."""
    end = 0
    for offset, part in overlaps(pieces, low, high):
        out[end:offset] = 0
        end = offset + part.size
        out[offset:end] = part
    out[end:] = 0
    return out


class Adder:
    """Adds contributions to fp32 totals block by block; its threads share one block of scratch memory.

    bfloat16 is the upper half of a float32, so the conversion is a shift and exact; float16 converts
    exactly too. Large totals are cut into runs for several threads (numpy lets the others run while it adds), and
    pieces of one may be added at once: which thread adds an element changes nothing, for the order of additions is
    each element's own.
    """

    def __init__(self, threads: int | None = None) -> None:
        """`threads`: of large totals; all cores, up to `ADDERS`, if not given."""
        self._threads = threads or min(os.cpu_count() or 1, ADDERS)
        self._bits = np.empty(ADDED_AT_ONCE, np.uint32)
        self._size = ADDED_AT_ONCE // self._threads
        self._scratch: SimpleQueue[Array] = SimpleQueue()  # a part for each thread, and for the caller
        for n in range(self._threads):
            self._scratch.put(self._bits[n * self._size : (n + 1) * self._size])
        self._pool: ThreadPoolExecutor | None = None

    @property
    def nbytes(self) -> int:
        return self._bits.nbytes

    def add(self, total: Array, contributions: Sequence[Pieces], wire: Wire, *, fresh: bool = False) -> None:
        """total[i] += c[i] for each contribution c in order; total: float32, and pieces count from its
        first element. `fresh`: total counts as zeros, whatever it holds.

        Overflow and NaN pass silently: whoever looks at the gradient's norm finds them.
        """
        (first, stop), *others = self._runs(total.size, self._threads)
        begun = [
            self._workers().submit(self._add_blocks, *run, total, contributions, wire, fresh)
            for run in others
        ]
        self._add_blocks(first, stop, total, contributions, wire, fresh)
        for one in begun:
            one.result()

    def begin(
        self, total: Array, contributions: Sequence[Pieces], wire: Wire, *, fresh: bool = False
    ) -> list[Future[None]]:
        """As `add`, beside the caller, who leaves all of it alone until the futures are done; none: it is done.

        That is for pieces of a total, of which several are added at once; small ones are not worth it. The caller has a
        part of the scratch memory left to itself, for those.
        """
        if self._threads == 1 or total.size < ADDED_BESIDE:
            self.add(total, contributions, wire, fresh=fresh)
            return []
        runs = self._runs(total.size, self._threads - 1)
        return [
            self._workers().submit(self._add_blocks, *run, total, contributions, wire, fresh) for run in runs
        ]

    def _runs(self, elements: int, threads: int) -> list[tuple[int, int]]:
        """The runs [first, stop) of a total, each added by one thread: whole blocks, and one run of a small total."""
        count = threads if elements >= SHARED_AMONG_THREADS else 1
        blocks = -(-elements // self._size)
        edges = [min(blocks * n // count * self._size, elements) for n in range(count + 1)]
        return list(pairwise(edges))

    def _workers(self) -> ThreadPoolExecutor:
        self._pool = self._pool or ThreadPoolExecutor(self._threads - 1, "adder")
        return self._pool

    def _add_blocks(
        self,
        first: int,
        stop: int,
        total: Array,
        contributions: Sequence[Pieces],
        wire: Wire,
        fresh: bool,
    ) -> None:
        """[first, stop) of `total`: each block is zeroed and added to while it is in the cache."""
        bits = self._scratch.get()
        try:
            with np.errstate(all="ignore"):
                for low in range(first, stop, self._size):
                    block = total[low : min(low + self._size, stop)]
                    if fresh:
                        block.fill(0)
                    for pieces in contributions:
                        for offset, part in overlaps(pieces, low, low + block.size):
                            target = block[offset : offset + part.size]
                            np.add(target, _wide(part, bits) if wire == "bfloat16" else part, out=target)
        finally:
            self._scratch.put(bits)


def _wide(part: Array, bits: Array) -> Array:
    """The float32 values of bfloat16 ones, in scratch memory."""
    wide = bits[: part.size]
    wide[:] = part
    np.left_shift(wide, 16, out=wide)
    return wide.view(np.float32)
