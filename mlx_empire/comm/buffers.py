"""Flat buffers: evaluated MLX arrays seen as numpy arrays without copying, and a reduce-scatter's arithmetic on them.

Views are the form in which bytes cross the network. numpy has no bfloat16, so those are seen as uint16. The views are
writable: MPI receives straight into MLX memory. They must be made on the main thread (MLX streams belong to threads)
and may be used anywhere.

The arithmetic (packing and fp32 additions over buffers with gaps) decides the order of additions within an element
(that of the ranks) and nothing else; no communication here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def empty_rows(wanted: Sequence[tuple[int, str]]) -> list[mx.array]:
    """For each (elements, dtype) an uninitialised buffer of shape (elements / 64, 64), evaluated together.

    Rows, so that no dimension passes 32 bits.
    """
    buffers = [mx.empty((elements // BLOCK, BLOCK), DTYPES[dtype]) for elements, dtype in wanted]
    mx.eval(buffers)
    return buffers


def host_view(array: mx.array) -> np.ndarray:
    """The flat numpy view of a contiguous array's memory; bfloat16 is seen as uint16. Evaluates the array.

    No node is added to a graph, so an array that is evaluated costs no evaluation. BufferError for one whose elements
    do not follow one another.
    """
    mx.eval(array)
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
    """Adds contributions to fp32 totals block by block; owns one block of scratch memory.

    bfloat16 is the upper half of a float32, so the conversion is a shift and exact; float16 converts
    exactly too.
    """

    def __init__(self) -> None:
        self._bits = np.empty(ADDED_AT_ONCE, np.uint32)

    @property
    def nbytes(self) -> int:
        return self._bits.nbytes

    def add(self, total: Array, contributions: Sequence[Pieces], wire: Wire) -> None:
        """total[i] += c[i] for each contribution c in order; total: float32, and pieces count from its
        first element.

        Overflow and NaN pass silently: whoever looks at the gradient's norm finds them.
        """
        with np.errstate(all="ignore"):
            for low in range(0, total.size, ADDED_AT_ONCE):
                block = total[low : low + ADDED_AT_ONCE]
                for pieces in contributions:
                    for offset, part in overlaps(pieces, low, low + block.size):
                        self._add_part(block[offset : offset + part.size], part, wire)

    def _add_part(self, target: Array, part: Array, wire: Wire) -> None:
        if wire == "bfloat16":
            bits = self._bits[: part.size]
            bits[:] = part
            np.left_shift(bits, 16, out=bits)
            part = bits.view(np.float32)
        np.add(target, part, out=target)
