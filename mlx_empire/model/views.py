"""MLX's primitives whose outputs lie in their input's buffer, seen in another way; some reshapes have to copy.

The rules are those of MLX's `backend/common` (0.32), read there.
"""

from __future__ import annotations

import math
from functools import cache

from mlx_empire.model.storage import (
    Buffers,
    Done,
    Flags,
    Primitive,
    Rule,
    Shape,
    contiguity,
    row_strides,
    whole,
)


def _same(m: Buffers, node: Primitive) -> Done:
    for out, array in zip(node.outputs, node.inputs[-len(node.outputs) :], strict=True):
        m.same(out, array)
    return Done(0)


def _depends(m: Buffers, node: Primitive) -> Done:
    for out, array in zip(node.outputs, node.inputs, strict=False):
        m.same(out, array)
    return Done(0)


def _broadcast(m: Buffers, node: Primitive) -> Done:
    (out,), array = node.outputs, node.inputs[0]
    v = m.views[array]
    grown = m.elements[out] > m.elements[array]
    flags = Flags(v.flags.contiguous, False, False) if grown else v.flags
    m.share(out, array, _broadcasted(m.shapes[array], v.strides, len(m.shapes[out])), flags, v.size)
    return Done(0)


@cache
def _broadcasted(shape: Shape, strides: Shape, dimensions: int) -> Shape:
    own = (0 if n == 1 else s for n, s in zip(shape, strides, strict=True))
    return ((0,) * (dimensions - len(shape))) + (*own,)


def _transpose(m: Buffers, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    v = m.views[array]
    strides = tuple(v.strides[axis] for axis in node.arguments[0])
    flags = v.flags
    if flags.contiguous and v.size == m.elements[array]:
        _, rows, columns = contiguity(m.shapes[out], strides)
        flags = Flags(True, rows, columns)
    m.share(out, array, strides, flags, v.size)
    return Done(0)


def _expand(m: Buffers, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    v = m.views[array]
    strides = list(v.strides)
    for axis in node.arguments[0]:
        strides.insert(axis, 1)
    m.share(out, array, tuple(strides), v.flags, v.size)
    return Done(0)


def _squeeze(m: Buffers, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    v = m.views[array]
    strides = tuple(s for i, s in enumerate(v.strides) if i not in node.arguments[0])
    m.share(out, array, strides, v.flags, v.size)
    return Done(0)


def _slice(m: Buffers, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    strides = _sliced(m.views[array].strides, tuple(node.arguments[2]))
    m.share(out, array, strides, *_spanned(m.shapes[out], strides))
    return Done(0)


@cache
def _sliced(strides: Shape, steps: Shape) -> Shape:
    return tuple(s * step for s, step in zip(strides, steps, strict=True))


@cache
def _spanned(shape: Shape, strides: Shape) -> tuple[Flags, int]:
    """The flags of such a view, and the elements of the data from its first to its last."""
    size = 1 + sum(abs(s) * (n - 1) for s, n in zip(strides, shape, strict=True))
    plain, rows, columns = contiguity(shape, strides)
    return Flags(plain == size, rows, columns), size


def _split(m: Buffers, node: Primitive) -> Done:
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


def _strided(m: Buffers, node: Primitive) -> Done:
    (out,), (array,) = node.outputs, node.inputs
    strides = tuple(node.arguments[1])
    m.share(out, array, strides, *_spanned(m.shapes[out], strides))
    return Done(0)


def _reshape(m: Buffers, node: Primitive) -> Done:
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


@cache
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


def _view(m: Buffers, node: Primitive) -> Done:
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


VIEWS: dict[str, Rule] = {
    **dict.fromkeys(("Copy", "StopGradient", "CustomTransforms"), _same),
    **dict.fromkeys(("Broadcast", "BroadcastAxes"), _broadcast),
    **dict.fromkeys(("Reshape", "Flatten", "Unflatten"), _reshape),
    "Depends": _depends,
    "Transpose": _transpose,
    "ExpandDims": _expand,
    "Squeeze": _squeeze,
    "Slice": _slice,
    "Split": _split,
    "AsStrided": _strided,
    "View": _view,
}
