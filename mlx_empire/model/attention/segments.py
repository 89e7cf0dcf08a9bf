"""Attention by pattern in the place of MLX's, while a layer is called: which segment goes to which kernel.

- up to `SHORT` positions: MLX's own attention;
- causal, where MLX's fused kernel for Metal takes it (`fused`): MLX's own, told "causal";
- else: `blocks`.

mlx-lm's layers ask for `mx.fast.scaled_dot_product_attention` at each call. Ours stands there within `attending` only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from mlx_empire.cluster.machine import computes_on_gpu
from mlx_empire.model.attention import blocks
from mlx_empire.model.attention.fused import takes
from mlx_empire.model.attention.patterns import CAUSAL, Pattern
from mlx_empire.recipe.run_sections import SHORT_ROW

SHORT = SHORT_ROW  # faster by MLX's own, and small
Attend = Callable[..., mx.array]  # as mx.fast.scaled_dot_product_attention
InBlocks = Callable[[blocks.Attention, list[mx.array]], mx.array]


@dataclass(frozen=True)
class Kernels:
    """For segments. `fused`: MLX's kernels for Metal; `short`: a length up to which MLX's own is taken."""

    fused: bool = False
    short: int = SHORT
    in_blocks: InBlocks = blocks.attend_in_blocks

    @classmethod
    def here(cls) -> Kernels:
        """Those of this machine."""
        return cls(mx.metal.is_available() and computes_on_gpu())


@contextmanager
def instead(attention: Attend) -> Iterator[Attend]:
    """`attention` in the place of `mx.fast.scaled_dot_product_attention`, which is given."""
    before = mx.fast.scaled_dot_product_attention
    mx.fast.scaled_dot_product_attention = attention
    try:
        yield before
    finally:
        mx.fast.scaled_dot_product_attention = before


@contextmanager
def attending(pattern: Pattern, kernels: Kernels) -> Iterator[None]:
    """Within, attention that is told "causal" is that of `pattern`."""

    def attention(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float,
        mask: object = None,
        sinks: mx.array | None = None,
        **more: object,
    ) -> mx.array:
        whole = q.shape[2] == k.shape[2] and isinstance(mask, str) and mask == CAUSAL
        assert whole, "a layer attends otherwise than when it was asked"
        return attend(q, k, v, scale=scale, pattern=pattern, kernels=kernels, sinks=sinks, plain=plain)

    with instead(attention) as plain:
        yield


def attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    pattern: Pattern,
    kernels: Kernels,
    plain: Attend,
    sinks: mx.array | None = None,
    softcap: float = 0.0,
) -> mx.array:
    """Attention of rows by `pattern`; shapes as in `attend_in_blocks`. `plain` is MLX's."""

    def of_segment(row: slice, a: int, b: int) -> mx.array:
        query, key, value = (x[row, :, a:b] for x in (q, k, v))
        window = pattern.window if pattern.window < b - a else 0
        fused = kernels.fused and not window and takes(query, value, sinks)
        if not softcap and (fused or b - a <= kernels.short):
            mask = _mask(b - a, window) if window else CAUSAL
            return plain(query, key, value, scale=scale, mask=mask, sinks=sinks)
        given = [query, key, value, *(() if sinks is None else (sinks,))]
        return kernels.in_blocks(blocks.Attention(scale, window, softcap), given)

    def of_rows(row: slice, segments: Sequence[tuple[int, int]]) -> mx.array:
        return _joined([of_segment(row, a, b) for a, b in segments], axis=2)

    by_row = [pattern.segments(r, q.shape[2]) for r in range(q.shape[0])]
    if len(set(by_row)) == 1:
        return of_rows(slice(None), by_row[0])
    return _joined([of_rows(slice(r, r + 1), segments) for r, segments in enumerate(by_row)], axis=0)


def _joined(parts: Sequence[mx.array], axis: int) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=axis)


def _mask(length: int, window: int) -> mx.array:
    """(length, length) booleans of a short segment: not more than `window` - 1 positions back."""
    query, key = mx.arange(length)[:, None], mx.arange(length)[None]
    return mx.logical_and(query >= key, query - key < window)
