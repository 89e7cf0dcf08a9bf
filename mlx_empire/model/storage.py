"""Buffers without bytes: which arrays lie in them, who still needs them, and how much is alive.

No array is computed and none is allocated: an array here is a shape, strides and the number of its buffer. What MLX's
primitives do with buffers is said in `primitives`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

Shape = tuple[int, ...]
DONATION_EXTRA = 16384  # bytes that a donated buffer may be larger than the output


class Primitive(NamedTuple):
    """One primitive of a graph; arrays are numbers."""

    name: str
    arguments: Sequence[Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Flags(NamedTuple):
    """As MLX has them: no gaps in the data; in the order of rows; in the order of columns."""

    contiguous: bool
    rows: bool
    columns: bool


@dataclass(slots=True)
class View:
    """How an array lies in its buffer; `size`: elements of the data that it spans."""

    buffer: int
    strides: Shape
    flags: Flags
    size: int


@cache  # few shapes, and each many times
def row_strides(shape: Shape) -> Shape:
    """Strides of an array in the order of rows."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


@cache
def whole(shape: Shape) -> Flags:
    """The flags of an array in the order of rows."""
    return Flags(True, True, math.prod(shape) <= 1 or math.prod(shape) == max(shape, default=1))


class ArraySizes(Protocol):
    """What is known of arrays by number: `shapes`, `items` (bytes of an element) and numbers of `elements`."""

    @property
    def shapes(self) -> Sequence[Shape]: ...
    @property
    def items(self) -> Sequence[int]: ...
    @property
    def elements(self) -> Sequence[int]: ...


@cache
def contiguity(shape: Shape, strides: Shape) -> tuple[int, bool, bool]:
    """(elements without broadcast dimensions, whether in the order of rows, whether in that of columns)."""
    return (
        math.prod(n for n, s in zip(shape, strides, strict=True) if s > 0),
        _in_order(shape[::-1], strides[::-1]),
        _in_order(shape, strides),
    )


def _in_order(shape: Shape, strides: Shape) -> bool:
    step = 1
    for n, stride in zip(shape, strides, strict=True):
        if stride != step and n != 1:
            return False
        step *= n
    return True


class Buffers:
    """Buffers, who needs them, and the arrays in them.

    A buffer lives while an array in it or a task that is not done does. `sole`: inputs of the primitive at hand that
    nobody else holds. With `donates` False no input's buffer is taken for an output, with `shares` False what MLX makes
    a view is a copy (both for tests).
    """

    def __init__(self, arrays: ArraySizes, *, donates: bool = True, shares: bool = True) -> None:
        self.shapes, self.items, self.elements = arrays.shapes, arrays.items, arrays.elements
        self.views: dict[int, View] = {}
        self.sole: Collection[int] = ()
        self.sizes: list[int] = []  # of buffers, in bytes
        self.firsts: list[int] = []  # of buffers, the array that was first in it; -1: a temporary
        self.holders: list[int] = []
        self.active = self.peak = 0  # beside the sources
        self._events: list[int] = []  # buffers that came, and ~ those that went
        self._peak_at = 0
        self._started = False
        self._donates, self._shares = donates, shares

    # ---- buffers

    def allocate(self, size: int, array: int = -1) -> int:
        """A new buffer for `array`, held by nobody yet."""
        self._events.append(len(self.sizes))
        self.sizes.append(size)
        self.firsts.append(array)
        self.holders.append(0)
        self.active += size
        if self.active > self.peak:
            self.peak, self._peak_at = self.active, len(self._events)
        return len(self.sizes) - 1

    def begin(self) -> None:
        """From here on counts the peak; what is there before the first call are the sources."""
        if not self._started:
            self._started, self.active = True, 0
            self._events = []
        self.peak, self._peak_at = self.active, len(self._events)

    def alive_at_peak(self) -> dict[int, int]:
        """Bytes that were alive at the peak, by the array that was first in a buffer; sources are left out."""
        alive = {b: None for b in self._events[: self._peak_at] if b >= 0}
        for event in self._events[: self._peak_at]:
            if event < 0:
                alive.pop(~event, None)
        found: dict[int, int] = {}
        for buffer in alive:
            found[self.firsts[buffer]] = found.get(self.firsts[buffer], 0) + self.sizes[buffer]
        return found

    def hold(self, buffer: int) -> None:
        """Somebody needs `buffer`."""
        self.holders[buffer] += 1

    def drop(self, buffers: Iterable[int]) -> None:
        """Somebody no longer needs `buffers`."""
        holders = self.holders
        for buffer in buffers:
            holders[buffer] -= 1
            if holders[buffer] == 0:
                self.active -= self.sizes[buffer]
                self._events.append(~buffer)

    # ---- arrays

    def forget(self, arrays: Iterable[int]) -> None:
        """Nobody holds `arrays` any more; their parts in the buffers go."""
        views = self.views
        self.drop([views.pop(array).buffer for array in arrays])

    def first_in(self, array: int) -> int:
        """The array that was first in the buffer of `array`."""
        return self.firsts[self.views[array].buffer]

    def place(self, array: int, view: View) -> None:
        """`array` lies so."""
        self.views[array] = view
        self.holders[view.buffer] += 1

    def fresh(self, array: int) -> None:
        """A new buffer in the order of rows."""
        shape, size = self.shapes[array], self.elements[array]
        buffer = self.allocate(size * self.items[array], array)
        self.place(array, View(buffer, row_strides(shape), whole(shape), size))

    def like(self, array: int, other: int) -> None:
        """A new buffer laid out as that of `other`."""
        v = self.views[other]
        self.place(array, View(self.allocate(v.size * self.items[array], array), v.strides, v.flags, v.size))

    def share(self, array: int, other: int, strides: Shape, flags: Flags, size: int) -> None:
        """The buffer of `other`, seen in another way."""
        if not self._shares:
            return self.fresh(array)
        return self.place(array, View(self.views[other].buffer, strides, flags, size))

    def same(self, array: int, other: int) -> None:
        """The buffer of `other` as it is."""
        v = self.views[other]
        self.share(array, other, v.strides, v.flags, v.size)

    def may_take(self, array: int, out: int) -> bool:
        """Whether `out` may lie in the buffer of its input `array`: nobody else needs it, and it has the size."""
        buffer = self.views[array].buffer
        return (
            self._donates
            and array in self.sole
            and self.holders[buffer] == 1
            and self.items[array] == self.items[out]
            and self.sizes[buffer] <= self.bytes_of(out) + DONATION_EXTRA
        )

    def take(self, array: int, out: int) -> None:
        """`out` lies in the buffer of `array`."""
        v = self.views[array]
        self.place(out, View(v.buffer, v.strides, v.flags, v.size))

    def bytes_of(self, array: int) -> int:
        """Bytes of all elements."""
        return self.elements[array] * self.items[array]


class Done(NamedTuple):
    """After a primitive: how many tasks were given to the stream, and the buffers that live until they are done."""

    tasks: int
    temporaries: tuple[int, ...] = ()


Rule = Callable[[Buffers, Primitive], Done]
