"""What MLX's primitives do to memory on a CPU: which share a buffer, which take one of their inputs, which make copies.

No array is computed and none is allocated: an array here is a shape, strides and the number of its buffer. The rules
are those of MLX's `backend/cpu` and `backend/common` (0.32), read there; `tests/model/test_liveness.py` holds them
against measured peaks. A primitive without a rule of its own takes a new buffer for each output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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


@dataclass
class View:
    """How an array lies in its buffer; `size`: elements of the data that it spans."""

    buffer: int
    strides: Shape
    flags: Flags
    size: int


def row_strides(shape: Shape) -> Shape:
    """Strides of an array in the order of rows."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def whole(shape: Shape) -> Flags:
    """The flags of an array in the order of rows."""
    return Flags(True, True, math.prod(shape) <= 1 or math.prod(shape) == max(shape, default=1))


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


class Memory:
    """Buffers, who refers to them, and the arrays in them.

    `shapes`, `items` (bytes of an element): by array. `references` counts who holds an array; a buffer lives while an
    array in it or a task that is not done does. With `donates` False no input's buffer is taken for an output, with
    `shares` False what MLX makes a view is a copy (both for tests).
    """

    def __init__(
        self, shapes: Sequence[Shape], items: Sequence[int], *, donates: bool = True, shares: bool = True
    ) -> None:
        self.shapes, self.items = shapes, items
        self.views: dict[int, View] = {}
        self.references: dict[int, int] = {}
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

    def drop(self, buffer: int) -> None:
        """Somebody no longer needs `buffer`."""
        self.holders[buffer] -= 1
        if self.holders[buffer] == 0:
            self.active -= self.sizes[buffer]
            self._events.append(~buffer)

    def refer(self, array: int, count: int = 1) -> None:
        """`count` more hold `array`."""
        self.references[array] = self.references.get(array, 0) + count

    def release(self, array: int) -> None:
        """One fewer holds `array`; with the last one its part in the buffer goes."""
        self.references[array] -= 1
        if self.references[array] == 0 and array in self.views:
            self.drop(self.views.pop(array).buffer)

    # ---- arrays

    def place(self, array: int, view: View) -> None:
        """`array` lies so."""
        self.views[array] = view
        self.hold(view.buffer)

    def fresh(self, array: int) -> None:
        """A new buffer in the order of rows."""
        shape = self.shapes[array]
        size = math.prod(shape)
        self.place(
            array,
            View(self.allocate(size * self.items[array], array), row_strides(shape), whole(shape), size),
        )

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
            and self.references[array] == 1
            and self.holders[buffer] == 1
            and self.items[array] == self.items[out]
            and self.sizes[buffer] <= math.prod(self.shapes[out]) * self.items[out] + DONATION_EXTRA
        )

    def take(self, array: int, out: int) -> None:
        """`out` lies in the buffer of `array`."""
        v = self.views[array]
        self.place(out, View(v.buffer, v.strides, v.flags, v.size))

    def bytes_of(self, array: int) -> int:
        """Bytes of all elements."""
        return math.prod(self.shapes[array]) * self.items[array]


class Done(NamedTuple):
    """After a primitive: how many tasks were given to the stream, and the buffers that live until they are done."""

    tasks: int
    temporaries: tuple[int, ...] = ()


Rule = Callable[[Memory, Primitive], Done]


# ---- views


def _same(m: Memory, node: Primitive) -> Done:
    for out, array in zip(node.outputs, node.inputs[-len(node.outputs) :], strict=True):
        m.same(out, array)
    return Done(0)


def _depends(m: Memory, node: Primitive) -> Done:
    for out, array in zip(node.outputs, node.inputs, strict=False):
        m.same(out, array)
    return Done(0)


def _broadcast(m: Memory, node: Primitive) -> Done:
    (out,), array = node.outputs, node.inputs[0]
    v, shape, full = m.views[array], m.shapes[array], m.shapes[out]
    strides = [0] * (len(full) - len(shape)) + [
        0 if n == 1 else s for n, s in zip(shape, v.strides, strict=True)
    ]
    grown = math.prod(full) > math.prod(shape)
    flags = Flags(v.flags.contiguous, False, False) if grown else v.flags
    m.share(out, array, tuple(strides), flags, v.size)
    return Done(0)


def _transpose(m: Memory, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    v = m.views[array]
    strides = tuple(v.strides[axis] for axis in node.arguments[0])
    flags = v.flags
    if flags.contiguous and v.size == math.prod(m.shapes[array]):
        _, rows, columns = contiguity(m.shapes[out], strides)
        flags = Flags(True, rows, columns)
    m.share(out, array, strides, flags, v.size)
    return Done(0)


def _expand(m: Memory, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    v = m.views[array]
    strides = list(v.strides)
    for axis in node.arguments[0]:
        strides.insert(axis, 1)
    m.share(out, array, tuple(strides), v.flags, v.size)
    return Done(0)


def _squeeze(m: Memory, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    v = m.views[array]
    strides = tuple(s for i, s in enumerate(v.strides) if i not in node.arguments[0])
    m.share(out, array, strides, v.flags, v.size)
    return Done(0)


def _slice(m: Memory, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    v, shape = m.views[array], m.shapes[out]
    strides = tuple(s * step for s, step in zip(v.strides, node.arguments[2], strict=True))
    size = 1 + sum(abs(s) * (n - 1) for s, n in zip(strides, shape, strict=True))
    plain, rows, columns = contiguity(shape, strides)
    m.share(out, array, strides, Flags(plain == size, rows, columns), size)
    return Done(0)


def _split(m: Memory, node: Primitive) -> Done:
    (array,) = node.inputs
    v = m.views[array]
    for out in node.outputs:
        size, rows, columns = contiguity(m.shapes[out], v.strides)
        contiguous = v.flags.contiguous
        if size == 1:
            contiguous = True
        elif size != v.size:
            contiguous = contiguous and (rows or columns)
        m.share(out, array, v.strides, Flags(contiguous, rows, columns), size)
    return Done(0)


def _strided(m: Memory, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    shape, strides = m.shapes[out], tuple(node.arguments[1])
    plain, rows, columns = contiguity(shape, strides)
    size = 1 + sum(abs(s) * (n - 1) for s, n in zip(strides, shape, strict=True))
    m.share(out, array, strides, Flags(plain == size, rows, columns), size)
    return Done(0)


def _reshape(m: Memory, node: Primitive) -> Done:
    """A view where the strides allow it, else a copy."""
    (out,), array = node.outputs, node.inputs[0]
    v, shape = m.views[array], m.shapes[out]
    if v.flags.rows:
        m.share(out, array, row_strides(shape), whole(shape), v.size)
        return Done(0)
    strides = _reshaped(m.shapes[array], v.strides, shape)
    if strides is None:
        m.fresh(out)
        return Done(1)
    m.share(out, array, strides, v.flags, v.size)
    return Done(0)


def _reshaped(shape: Shape, strides: Shape, wanted: Shape) -> Shape | None:
    """Strides of `wanted` over the same data; None where it has to be copied."""
    if not shape:
        return (0,) * len(wanted)
    collapsed = [[shape[0], strides[0]]]
    for n, stride in zip(shape[1:], strides[1:], strict=True):
        if n == 1:
            continue
        if stride * n != collapsed[-1][1] or collapsed[-1][0] * n > 2**31 - 1:
            collapsed.append([n, stride])
        else:
            collapsed[-1] = [collapsed[-1][0] * n, stride]
    found: list[int] = []
    j = 0
    for n in wanted:
        if j < len(collapsed) and collapsed[j][0] % n == 0:
            collapsed[j][0] //= n
            found.append(collapsed[j][0] * collapsed[j][1])
            j += collapsed[j][0] == 1
        elif n == 1:
            found.append(found[-1] if found else 1)
        else:
            return None
    return tuple(found)


def _view(m: Memory, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    if m.items[out] == m.items[array]:
        m.same(out, array)
    elif m.views[array].flags.rows:
        shape = m.shapes[out]
        m.share(out, array, row_strides(shape), whole(shape), math.prod(shape))
    else:
        m.fresh(out)
        return Done(1)
    return Done(0)


# ---- element by element


def _elementwise(m: Memory, node: Primitive) -> Done:
    if len(node.inputs) == 1:
        return _unary(m, node)
    return _binary(m, node) if len(node.inputs) == 2 else _ternary(m, node)


def _unary(m: Memory, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    if not m.views[array].flags.contiguous:
        m.fresh(out)
    elif m.may_take(array, out):
        m.take(array, out)
    else:
        m.like(out, array)
    return Done(1)


def _binary(m: Memory, node: Primitive) -> Done:
    """Outputs as large as what the inputs span: one number for two numbers that are broadcast."""
    a, b = node.inputs
    va, vb = m.views[a], m.views[b]
    for out in node.outputs:
        if va.size == 1 and vb.size == 1:
            m.place(out, View(m.allocate(m.items[out], out), va.strides, va.flags, 1))
            continue
        if va.size == 1 and vb.flags.contiguous:
            candidates, model = [b], b
        elif vb.size == 1 and va.flags.contiguous:
            candidates, model = [a], a
        elif (va.flags.rows and vb.flags.rows) or (va.flags.columns and vb.flags.columns):
            candidates, model = [a, b], a
        else:
            whole_ones = [
                x
                for x in (a, b)
                if m.views[x].flags.rows and math.prod(m.shapes[x]) == math.prod(m.shapes[out])
            ]
            candidates, model = whole_ones, -1
        _take_or_make(m, out, candidates, model)
    return Done(1)


def _ternary(m: Memory, node: Primitive) -> Done:
    (out,) = node.outputs
    views = [m.views[x] for x in node.inputs]
    if all(v.size == 1 for v in views):
        m.place(out, View(m.allocate(m.items[out], out), views[1].strides, views[1].flags, 1))
    elif all(v.flags.rows for v in views) or all(v.flags.columns for v in views):
        _take_or_make(m, out, node.inputs, node.inputs[1])
    else:
        _take_or_make(m, out, [x for x, v in zip(node.inputs, views, strict=True) if v.flags.rows], -1)
    return Done(1)


def _take_or_make(m: Memory, out: int, candidates: Sequence[int], model: int) -> None:
    """The buffer of the first candidate that can be taken, else a new one like that of `model` (-1: whole)."""
    for array in candidates:
        if m.may_take(array, out):
            return m.take(array, out)
    return m.fresh(out) if model < 0 else m.like(out, model)


# ---- copies


def _copied(m: Memory, out: int, array: int, *, vector: bool) -> int:
    """MLX's copy of `array` to `out`: its buffer where that may be; the number of tasks."""
    if not vector:
        m.fresh(out)
        return 1
    if m.may_take(array, out):
        m.take(array, out)
        return 0
    m.like(out, array)
    return 1


def _astype(m: Memory, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    _copied(m, out, array, vector=m.views[array].flags.contiguous)
    return Done(1)  # also in a buffer that was taken: it has other numbers


def _full(m: Memory, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    v = m.views[array]
    return Done(_copied(m, out, array, vector=v.size != 1 and v.flags.contiguous))


def _scatter(m: Memory, node: Primitive) -> Done:
    (out,), array = node.outputs, node.inputs[0]
    return Done(1 + _copied(m, out, array, vector=m.views[array].flags.rows))


def _update(m: Memory, node: Primitive) -> Done:
    (out,), array = node.outputs, node.inputs[0]
    v = m.views[array]
    vector = v.size != 1 and v.flags.contiguous and v.size == math.prod(m.shapes[array])
    return Done(1 + _copied(m, out, array, vector=vector))


def _sort(m: Memory, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    return Done(1 + _copied(m, out, array, vector=m.views[array].flags.contiguous))


def _concatenate(m: Memory, node: Primitive) -> Done:
    m.fresh(node.outputs[0])
    return Done(len(node.inputs))


def _pad(m: Memory, node: Primitive) -> Done:
    m.fresh(node.outputs[0])
    return Done(2)


# ---- reductions and products


def _softmax(m: Memory, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    v = m.views[array]
    if not (v.flags.contiguous and v.strides[-1] == 1):
        m.fresh(out)
        return Done(2)
    if m.may_take(array, out):
        m.take(array, out)
    else:
        m.like(out, array)
    return Done(1)


def _needs_rows(m: Memory, node: Primitive) -> Done:
    """A copy of every input that is not in the order of rows."""
    temporaries = [_temporary(m, x) for x in node.inputs if not m.views[x].flags.rows]
    for out in node.outputs:
        m.fresh(out)
    return Done(1 + len(temporaries), tuple(temporaries))


def _temporary(m: Memory, array: int) -> int:
    buffer = m.allocate(m.bytes_of(array))
    m.hold(buffer)
    return buffer


def _product(m: Memory, node: Primitive) -> Done:
    """A copy of every matrix that is neither in the order of rows nor in that of columns."""
    (out,), (a, b, *rest) = node.outputs, node.inputs
    tasks = 1
    if node.name == "AddMM":
        v = m.views[rest[0]]
        tasks += _copied(m, out, rest[0], vector=v.size != 1 and v.flags.rows)
    else:
        m.fresh(out)
    temporaries = tuple(_temporary(m, x) for x in (a, b) if not _is_matrix(m, x))
    return Done(tasks + len(temporaries), temporaries)


def _is_matrix(m: Memory, array: int, *, transposed: bool = True) -> bool:
    (rows, columns), (by_row, by_column) = m.shapes[array][-2:], m.views[array].strides[-2:]
    if by_row == columns and by_column == 1:
        return True
    return transposed and by_row == 1 and by_column == rows


def _packed_product(m: Memory, node: Primitive) -> Done:
    """Of stacked packed matrices: last dimensions in the order of rows."""
    matrices = node.inputs[: len(node.inputs) - 2]
    temporaries = tuple(_temporary(m, x) for x in matrices if not _is_matrix(m, x, transposed=False))
    m.fresh(node.outputs[0])
    return Done(1 + len(temporaries), temporaries)


def _convolution(m: Memory, node: Primitive) -> Done:
    """By explicit matrices where there is one spatial dimension and no dilation, else in place."""
    (out,), (array, weight) = node.outputs, node.inputs
    m.fresh(out)
    _, low, high, dilation, input_dilation, groups, flip = node.arguments
    shape, kernel = m.shapes[array], m.shapes[weight]
    explicit = {*dilation, *input_dilation} == {1} and ((len(shape) == 3 and not flip) or groups == 1)
    if not explicit:
        return Done(1)
    spatial = [n + a + b for n, a, b in zip(shape[1:-1], low, high, strict=True)]
    padded = shape[0] * math.prod(spatial) * shape[-1]
    strided = shape[0] * math.prod(m.shapes[out][1:-1]) * math.prod(kernel[1:-1]) * shape[-1]
    sizes = [padded, strided]
    if groups > 1 or m.items[weight] != 4 or not m.views[weight].flags.rows:
        sizes.append(math.prod(kernel))
    if flip and groups == 1:
        sizes.append(math.prod(kernel))
    if m.items[out] != 4:
        sizes.append(math.prod(m.shapes[out]))
    buffers = [m.allocate(4 * size) for size in sizes]
    for buffer in buffers:
        m.hold(buffer)
    return Done(2 + len(sizes), tuple(buffers))


def _new(m: Memory, node: Primitive) -> Done:
    for out in node.outputs:
        m.fresh(out)
    return Done(1)


_ELEMENTWISE = (
    "Abs Add ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTan2 ArcTanh BitwiseBinary BitwiseInvert Ceil Conjugate Cos Cosh "
    "DivMod Divide Equal Erf ErfInv Exp Expm1 Floor FloorDivide Greater GreaterEqual Imag Less LessEqual Log Log1p "
    "LogAddExp LogicalAnd LogicalNot LogicalOr Maximum Minimum Multiply Negative NotEqual Power Real Remainder Round "
    "Select Sigmoid Sign Sin Sinh Sqrt Square Subtract Tan Tanh"
)
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(("Copy", "StopGradient", "CustomTransforms"), _same),
    **dict.fromkeys(("Broadcast", "BroadcastAxes"), _broadcast),
    **dict.fromkeys(("Reshape", "Flatten", "Unflatten"), _reshape),
    **dict.fromkeys(("Scatter", "ScatterAxis", "MaskedScatter"), _scatter),
    **dict.fromkeys(("SliceUpdate", "DynamicSliceUpdate"), _update),
    **dict.fromkeys(("Sort", "Partition"), _sort),
    **dict.fromkeys(("QuantizedMatmul", "Quantize", "Scan"), _needs_rows),
    **dict.fromkeys(("Matmul", "AddMM", "GatherMM"), _product),
    "Depends": _depends,
    "Transpose": _transpose,
    "ExpandDims": _expand,
    "Squeeze": _squeeze,
    "Slice": _slice,
    "Split": _split,
    "AsStrided": _strided,
    "View": _view,
    "AsType": _astype,
    "Full": _full,
    "Concatenate": _concatenate,
    "Pad": _pad,
    "Softmax": _softmax,
    "GatherQMM": _packed_product,
    "Convolution": _convolution,
}


def evaluate(memory: Memory, node: Primitive) -> Done:
    """Give the outputs of a primitive their buffers; its inputs have theirs."""
    return _RULES.get(node.name, _new)(memory, node)
