"""Which buffers the outputs of MLX's primitives get on a CPU: which share one, which take an input's, which are new.

The rules are those of MLX's `backend/cpu` and `backend/common` (0.32), read there; `tests/model/test_liveness.py` holds
them against measured peaks. A primitive without a rule of its own takes a new buffer for each output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlx_empire.model.storage import Buffers, Done, Primitive, Rule, View
from mlx_empire.model.views import VIEWS

# ---- element by element


def _unary(m: Buffers, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    if m.views[array].flags.contiguous:
        _take_or_like(m, out, array)
    else:
        m.fresh(out)
    return Done(1)


def _take_or_like(m: Buffers, out: int, array: int) -> None:
    """The input's buffer where nobody else reads it, else one of the same order of elements."""
    if m.may_take(array, out):
        m.take(array, out)
    else:
        m.like(out, array)


def _binary(m: Buffers, node: Primitive) -> Done:
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
            whole_ones = [x for x in (a, b) if m.views[x].flags.rows and m.elements[x] == m.elements[out]]
            candidates, model = whole_ones, -1
        _take_or_make(m, out, candidates, model)
    return Done(1)


def _ternary(m: Buffers, node: Primitive) -> Done:
    (out,) = node.outputs
    views = [m.views[x] for x in node.inputs]
    if all(v.size == 1 for v in views):
        m.place(out, View(m.allocate(m.items[out], out), views[1].strides, views[1].flags, 1))
    elif all(v.flags.rows for v in views) or all(v.flags.columns for v in views):
        _take_or_make(m, out, node.inputs, node.inputs[1])
    else:
        _take_or_make(m, out, [x for x, v in zip(node.inputs, views, strict=True) if v.flags.rows], -1)
    return Done(1)


def _take_or_make(m: Buffers, out: int, candidates: Sequence[int], model: int) -> None:
    """The buffer of the first candidate that can be taken, else a new one like that of `model` (-1: whole)."""
    for array in candidates:
        if m.may_take(array, out):
            return m.take(array, out)
    return m.fresh(out) if model < 0 else m.like(out, model)


# ---- copies


def _copied(m: Buffers, out: int, array: int, *, vector: bool) -> int:
    """MLX's copy of `array` to `out`: its buffer where that may be; the number of tasks."""
    if not vector:
        m.fresh(out)
        return 1
    if m.may_take(array, out):
        m.take(array, out)
        return 0
    m.like(out, array)
    return 1


def _astype(m: Buffers, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    _copied(m, out, array, vector=m.views[array].flags.contiguous)
    return Done(1)  # also in a buffer that was taken: it has other numbers


def _full(m: Buffers, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    v = m.views[array]
    return Done(_copied(m, out, array, vector=v.size != 1 and v.flags.contiguous))


def _scatter(m: Buffers, node: Primitive) -> Done:
    (out,), array = node.outputs, node.inputs[0]
    return Done(1 + _copied(m, out, array, vector=m.views[array].flags.rows))


def _update(m: Buffers, node: Primitive) -> Done:
    (out,), array = node.outputs, node.inputs[0]
    v = m.views[array]
    vector = v.size != 1 and v.flags.contiguous and v.size == m.elements[array]
    return Done(1 + _copied(m, out, array, vector=vector))


def _sort(m: Buffers, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    return Done(1 + _copied(m, out, array, vector=m.views[array].flags.contiguous))


def _concatenate(m: Buffers, node: Primitive) -> Done:
    m.fresh(node.outputs[0])
    return Done(len(node.inputs))


def _pad(m: Buffers, node: Primitive) -> Done:
    m.fresh(node.outputs[0])
    return Done(2)


# ---- reductions and products


def _softmax(m: Buffers, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    v = m.views[array]
    if not (v.flags.contiguous and v.strides[-1] == 1):
        m.fresh(out)
        return Done(2)
    _take_or_like(m, out, array)
    return Done(1)


def _needs_rows(m: Buffers, node: Primitive) -> Done:
    """A copy of every input that is not in the order of rows."""
    temporaries = [_temporary(m, x) for x in node.inputs if not m.views[x].flags.rows]
    for out in node.outputs:
        m.fresh(out)
    return Done(1 + len(temporaries), tuple(temporaries))


def _temporary(m: Buffers, array: int) -> int:
    buffer = m.allocate(m.bytes_of(array))
    m.hold(buffer)
    return buffer


def _product(m: Buffers, node: Primitive) -> Done:
    """A copy of every matrix that is neither in the order of rows nor in that of columns."""
    (out,), (a, b, *rest) = node.outputs, node.inputs
    tasks = 1
    if node.name == "AddMM":
        v = m.views[rest[0]]
        tasks += _copied(m, out, rest[0], vector=v.size != 1 and v.flags.rows)
    else:
        m.fresh(out)
    if _is_matrix(m, a) and _is_matrix(m, b):
        return Done(tasks)
    temporaries = tuple(_temporary(m, x) for x in (a, b) if not _is_matrix(m, x))
    return Done(tasks + len(temporaries), temporaries)


def _is_matrix(m: Buffers, array: int, *, transposed: bool = True) -> bool:
    (rows, columns), (by_row, by_column) = m.shapes[array][-2:], m.views[array].strides[-2:]
    if by_row == columns and by_column == 1:
        return True
    return transposed and by_row == 1 and by_column == rows


def _packed_product(m: Buffers, node: Primitive) -> Done:
    """Of stacked packed matrices: last dimensions in the order of rows."""
    matrices = node.inputs[: len(node.inputs) - 2]
    temporaries = tuple(_temporary(m, x) for x in matrices if not _is_matrix(m, x, transposed=False))
    m.fresh(node.outputs[0])
    return Done(1 + len(temporaries), temporaries)


def _convolution(m: Buffers, node: Primitive) -> Done:
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


def _new(m: Buffers, node: Primitive) -> Done:
    for out in node.outputs:
        m.fresh(out)
    return Done(1)


_NAMES = (
    "Abs Add ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTan2 ArcTanh BitwiseBinary BitwiseInvert Ceil Conjugate Cos Cosh "
    "DivMod Divide Equal Erf ErfInv Exp Expm1 Floor FloorDivide Greater GreaterEqual Imag Less LessEqual Log Log1p "
    "LogAddExp LogicalAnd LogicalNot LogicalOr Maximum Minimum Multiply Negative NotEqual Power Real Remainder Round "
    "Select Sigmoid Sign Sin Sinh Sqrt Square Subtract Tan Tanh"
)
_ELEMENTWISE = frozenset(_NAMES.split())
_RULES: dict[str, Rule] = {
    **VIEWS,
    **dict.fromkeys(("Scatter", "ScatterAxis", "MaskedScatter"), _scatter),
    **dict.fromkeys(("SliceUpdate", "DynamicSliceUpdate"), _update),
    **dict.fromkeys(("Sort", "Partition"), _sort),
    **dict.fromkeys(("QuantizedMatmul", "Quantize", "Scan"), _needs_rows),
    **dict.fromkeys(("Matmul", "AddMM", "GatherMM"), _product),
    "AsType": _astype,
    "Full": _full,
    "Concatenate": _concatenate,
    "Pad": _pad,
    "Softmax": _softmax,
    "GatherQMM": _packed_product,
    "Convolution": _convolution,
}


def rule_of(node: Primitive) -> Rule:
    """What gives the outputs of a primitive their buffers, once its inputs have theirs."""
    if node.name in _ELEMENTWISE:
        return (_unary, _binary, _ternary)[len(node.inputs) - 1]
    return _RULES.get(node.name, _new)
