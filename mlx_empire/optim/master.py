"""Decides how an fp32 master weight is kept beside a bf16 model: 16 + 16 bits, exactly.

With b the bits of the fp32 weight, the bf16 weight is the upper half of b + 0x8000 (nearest, ties away from
zero) and the remainder is the int16 difference between b and that half. Joining adds them again as
integers: every bit pattern comes back. Above bf16's maximum the bf16 weight is infinite but the master is
not lost. A bf16 checkpoint starts with remainder 0. The same split is Transformer Engine's.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_empire.optim.fusion import fused


def join(weights: mx.array, remainder: mx.array) -> mx.array:
    """The fp32 master (float32) of bfloat16 `weights` and int16 `remainder`, all of one shape."""
    joined: mx.array = _join_bits(weights.view(mx.int16), remainder).view(mx.float32)
    return joined


def split(master: mx.array) -> tuple[mx.array, mx.array]:
    """(weights bfloat16, remainder int16) of a float32 `master`; the inverse of `join`."""
    upper, remainder = _split_bits(master.view(mx.uint32))
    return upper.view(mx.bfloat16), remainder


@fused
def _join_bits(upper: mx.array, remainder: mx.array) -> mx.array:
    return mx.left_shift(upper.astype(mx.int32), 16) + remainder.astype(mx.int32)


@fused
def _split_bits(bits: mx.array) -> tuple[mx.array, mx.array]:
    # Unsigned, so that the addition may wrap. The lower half of b + 0x8000, less 0x8000, is the remainder.
    shifted = bits + mx.array(0x8000, mx.uint32)
    lower = mx.bitwise_and(shifted, mx.array(0xFFFF, mx.uint32)).astype(mx.int32) - 0x8000
    return mx.right_shift(shifted, mx.array(16, mx.uint32)).astype(mx.uint16), lower.astype(mx.int16)
