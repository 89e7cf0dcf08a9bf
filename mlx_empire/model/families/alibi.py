"""ALiBi (arXiv:2108.12409): what is added to attention's scores in the place of positions in the hidden state.

Decides how positions are counted and rounded. As in transformers' Falcon, a key's position times the head's slope is
added, both and the product rounded to bfloat16, in a model of any dtype: from position 256 on neighbours share a value.
Positions count from the first key that a query sees, so a packed document, or a row padded on the left, has the
values that it has alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Of each head: 2^(-8 i / n) for the largest power of two n in `heads`; the others take every second of 2n's."""
    power = 1 << int(math.log2(heads))
    first = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return tuple(first + [2.0 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)])


def alibi_mask(
    slopes: Sequence[float],
    mask: mx.array | str | None,
    queries: int,
    keys: int,
    scale: float,
    dtype: mx.Dtype,
) -> mx.array:
    """(heads, queries, keys), or (rows, heads, queries, keys) for a mask with rows: added to scaled scores.

    `mask`: booleans (.., queries, keys), True where a query sees a key; "causal" or None for the last `queries` of
    `keys` positions. What a query does not see has minus infinity.
    """
    position = mx.arange(keys)
    if isinstance(mask, mx.array):
        position = mx.maximum(position - mx.argmax(mask, axis=-1, keepdims=True), 0)
    else:
        mask = mx.arange(keys - queries, keys)[:, None] >= position
    slope = mx.array(list(slopes), mx.bfloat16)[:, None, None]
    added = (slope * position.astype(mx.bfloat16)).astype(mx.float32) * scale
    return mx.where(mask, added.astype(dtype), mx.array(-mx.inf, dtype))
