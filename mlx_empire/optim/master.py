"""Decides what keeps an fp32 master weight beside a bf16 model: two bytes exactly, one, a whole copy, or nothing.

With b the bits of the fp32 weight, the bf16 weight is the upper half of b + 0x8000 (nearest, ties away from
zero) and the remainder is the difference between b and that half. Joining adds them again as integers.

- exact: `remainder` is an int16: every bit pattern comes back (the split is Transformer Engine's);
- diet:  b is first rounded to its upper 24 bits, up with the probability that keeps its mean; the remainder is
  then a multiple of 2^8 and `short_remainder` an int8. For rates from about 1e-5: below, noise drowns updates;
- fp32:  the master is kept whole, as `master`, and the bf16 weight is the same as with `exact`;
- none:  b is rounded to its upper 16 bits in the same way as diet's, and nothing is kept.

Bits grow with the weight's magnitude, in equal steps between neighbours, so rounding them without bias rounds
the weight without bias. Above bf16's maximum the bf16 weight is infinite but an exact master is not lost; what
is not finite is never rounded into a finite number. A bf16 checkpoint starts with remainder 0.

A float16 weight has another exponent, so no half completes it: its master is always kept whole (`fp32`), and the weight
is the nearest float16 of it, ties to even.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_empire.optim.compile import fused
from mlx_empire.optim.rounding import column_keys, draw

State = dict[str, mx.array]

KINDS = ("exact", "diet", "fp32", "none")
KEPT: dict[str, tuple[str, mx.Dtype]] = {  # kind -> name and dtype of what is kept beside a bfloat16 weight
    "exact": ("remainder", mx.int16),
    "diet": ("short_remainder", mx.int8),
    "fp32": ("master", mx.float32),
}


def completing(weight_dtype: str, asked: str) -> str:
    """What completes weights of a plan's dtype where `asked` is set: a kind, or `float32` where nothing must."""
    return {"bfloat16": asked, "float16": "fp32"}.get(weight_dtype, "float32")


def first_state(weights: mx.array, kind: str) -> State:
    """What is kept beside bfloat16 `weights` at the start: a zero remainder, a copy, or nothing."""
    if kind == "none":
        return {}
    name, dtype = KEPT[kind]
    return {name: weights.astype(dtype) if kind == "fp32" else mx.zeros(weights.shape, dtype)}


def joined(weights: mx.array, state: State) -> mx.array:
    """The fp32 weights (float32) that bfloat16 `weights` and what `state` keeps beside them stand for."""
    if "master" in state:
        return state["master"]
    if "remainder" in state:
        return join(weights, state["remainder"])
    if "short_remainder" in state:
        master: mx.array = _join_diet(weights.view(mx.int16), state["short_remainder"]).view(mx.float32)
        return master
    return weights.astype(mx.float32)


def in_half(master: mx.array) -> tuple[mx.array, State]:
    """(weights float16, the whole `master`) of a float32 `master`."""
    return master.astype(mx.float16), {"master": master}


def parted(master: mx.array, kind: str, keys: mx.array | None) -> tuple[mx.array, State]:
    """(weights bfloat16, what is kept) of a float32 `master` (rows, 64); `keys` as in `codec.encode`.

    Only `diet` and `none` draw noise and need the keys.
    """
    if kind == "exact":
        weights, remainder = split(master)
        return weights, {"remainder": remainder}
    if kind == "fp32":
        return _nearest(master.view(mx.uint32)).view(mx.bfloat16), {"master": master}
    assert keys is not None
    if kind == "diet":
        upper, remainder = _split_diet(master.view(mx.uint32), keys, column_keys())
        return upper.view(mx.bfloat16), {"short_remainder": remainder}
    return _upper_half(master.view(mx.uint32), keys, column_keys()).view(mx.bfloat16), {}


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
def _join_diet(upper: mx.array, remainder: mx.array) -> mx.array:
    return mx.left_shift(upper.astype(mx.int32), 16) + mx.left_shift(remainder.astype(mx.int32), 8)


def _halves(bits: mx.array) -> tuple[mx.array, mx.array]:
    # Unsigned, so that sums may wrap. The remainder comes from the upper half, and not from what that comes from too:
    # MLX fuses two results into one kernel only where one leads to the other.
    upper = mx.right_shift(bits + mx.array(0x8000, mx.uint32), mx.array(16, mx.uint32)).astype(mx.uint16)
    lower = bits - mx.left_shift(upper.astype(mx.uint32), mx.array(16, mx.uint32))
    return upper, lower.astype(mx.int32)


@fused
def _split_bits(bits: mx.array) -> tuple[mx.array, mx.array]:
    upper, lower = _halves(bits)
    return upper, lower.astype(mx.int16)


@fused
def _nearest(bits: mx.array) -> mx.array:
    return _halves(bits)[0]


@fused
def _split_diet(bits: mx.array, keys: mx.array, columns: mx.array) -> tuple[mx.array, mx.array]:
    kept = mx.bitwise_and(_carried(bits, keys, columns, 8), mx.array(0xFFFFFF00, mx.uint32))
    upper, lower = _halves(kept)
    return upper, mx.right_shift(lower, 8).astype(mx.int8)


@fused
def _upper_half(bits: mx.array, keys: mx.array, columns: mx.array) -> mx.array:
    return mx.right_shift(_carried(bits, keys, columns, 16), mx.array(16, mx.uint32)).astype(mx.uint16)


def _carried(bits: mx.array, keys: mx.array, columns: mx.array, lost: int) -> mx.array:
    """`bits` plus noise below 2^lost: what remains above is rounded without bias. Infinities stay, and NaN too."""
    noise = mx.bitwise_and(draw(keys, columns), mx.array((1 << lost) - 1, mx.uint32))
    magnitude = mx.bitwise_and(bits, mx.array(0x7FFFFFFF, mx.uint32))
    nan = magnitude > mx.array(0x7F800000, mx.uint32)
    return mx.where(nan, mx.array(0x7FC00000, mx.uint32), bits) + noise
