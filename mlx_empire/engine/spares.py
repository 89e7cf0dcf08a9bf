"""Large buffers that are in use no longer, handed out again to whoever asks for the same sizes.

So memory of a unit's size is asked for in the first step alone: on a Mac the system would clear and map it anew each
time. How much may be kept is the plan's business, for what is kept lies beside all that comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_empire.comm.buffers import DTYPES, empty_rows
from mlx_empire.model.spec import BLOCK
from mlx_empire.optim.compile import compiling_alone, fused


class Spares:
    """Buffers in use and kept, together never more than `most` bytes; without it than were ever in use at once.

    What is in use is not bounded; the oldest of those that are kept make room for it.
    """

    def __init__(self, most: int | None = None) -> None:
        self._free: list[tuple[list[mx.array], mx.array | None]] = []
        self._grows, self._most = most is None, most or 0
        self._used = 0  # bytes

    def take(
        self, wanted: Sequence[tuple[int, str]], evaluate: Callable[[list[mx.array]], None] = mx.eval
    ) -> tuple[list[mx.array], mx.array | None]:
        """Uninitialised buffers for (elements, dtype), as `empty_rows` gives them, and what to wait for before they are
        written."""
        for i, (buffers, _) in enumerate(self._free):
            if [(b.size, b.dtype) for b in buffers] == [(size, DTYPES[dtype]) for size, dtype in wanted]:
                self._used += _bytes(buffers)
                return self._free.pop(i)
        self._used += sum(size * DTYPES[dtype].size for size, dtype in wanted)
        self._make_room()
        return empty_rows(wanted, evaluate), None

    def give(self, buffers: list[mx.array], mark: mx.array | None = None) -> None:
        """What nothing reads any more once `mark` is there."""
        self._used -= _bytes(buffers)
        self._free.append((buffers, mark))
        self._make_room()

    def drop(self) -> None:
        """Give back what is not in use, and forget how much ever was."""
        self._free = []
        if self._grows:
            self._most = self._used

    def _make_room(self) -> None:
        if self._grows:
            self._most = max(self._most, self._used)
        kept = sum(_bytes(buffers) for buffers, _ in self._free)
        while self._free and self._used + kept > self._most:
            kept -= _bytes(self._free.pop(0)[0])


def rounded_into(buffers: list[mx.array], wide: Sequence[mx.array]) -> list[mx.array]:
    """`wide` in bfloat16, lazily, in the memory of `buffers` (same shapes), of which the list is emptied.

    MLX computes in place of an input that nobody else holds. Where somebody does, or where nothing is fused, it takes
    memory of its own. A GPU starts no fused kernel on an array without elements, such as an empty interval's.
    """
    buffers.reverse()
    return [_rounded(array, buffers.pop()) if array.size else buffers.pop() for array in wide]


@fused
def _rounded(wide: mx.array, into: mx.array) -> mx.array:
    narrow = wide.astype(mx.bfloat16)
    return mx.where(into == into, narrow, narrow)  # whatever it holds


def compile_rounding() -> None:
    """Have the kernels of `rounded_into` built, one process at a time; a single row has one of its own."""
    with compiling_alone():
        for rows in (1, 2):
            mx.eval(_rounded(mx.zeros((rows, BLOCK)), mx.zeros((rows, BLOCK), mx.bfloat16)))


def _bytes(buffers: Sequence[mx.array]) -> int:
    return sum(buffer.nbytes for buffer in buffers)
