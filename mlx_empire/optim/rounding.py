"""Decides the randomness of stochastic rounding: a stateless hash of (tensor, row, column, step, salt).

Replicas agree, a resumed run continues bitwise and nothing depends on how a tensor is cut. Rows and columns
are hashed one after the other, so the index never wraps (2**32 rows are 2**38 elements). The mixer is a
32-bit xorshift-multiply (16, 0x7feb352d, 15, 0x846ca68b, 16: Wellons' "lowbias32").
"""

from __future__ import annotations

from functools import cache, lru_cache

import mlx.core as mx
import numpy as np

from mlx_empire.model.spec import BLOCK
from mlx_empire.optim.compile import fused

_GOLDEN = 0x9E3779B9
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)


def row_keys(rows: int, tensor: int, first_row: int, step: int | mx.array, salt: int) -> mx.array:
    """(rows, 1) uint32: the hash of everything but the column, for rows first_row, first_row + 1, ...

    `step` may be an array (a whole number): then nothing here needs its value.
    """
    if first_row + rows > 1 << 32:
        raise ValueError("a tensor of more than 2**38 elements")
    first, second = _seed(tensor, step, salt)
    keys: mx.array = _row_keys(_count(rows), mx.array(first_row, mx.uint32), first, second)
    return keys


def draw(keys: mx.array, columns: mx.array) -> mx.array:
    """Uint32, 32 random bits, from (rows, 1) `keys` and `column_keys()`. Element-wise; lossy masters use it."""
    return _mix(keys + columns)


def draw_halves(keys: mx.array) -> mx.array:
    """(rows, 64) uint16, 16 random bits, from (rows, 1) `keys`: the halves of 32 draws. Codes use it.

    Its columns follow those of `column_keys`, so codes and lossy masters draw from different hashes.
    """
    halves: mx.array = _drawn(keys, _pair_keys()).view(mx.uint16)  # the lower half comes first
    return halves


@cache
def column_keys() -> mx.array:
    """(64,) uint32: one odd stride per column."""
    return _strides(0, BLOCK)


@cache
def _pair_keys() -> mx.array:
    return _strides(BLOCK, BLOCK // 2)


def _strides(first: int, count: int) -> mx.array:
    numbers = np.arange(first, first + count, dtype=np.uint64)
    keys = mx.array((numbers * _GOLDEN & _MASK).astype(np.uint32))
    mx.eval(keys)
    return keys


@lru_cache(maxsize=256)
def _count(rows: int) -> mx.array:
    count = mx.arange(rows, dtype=mx.uint32)[:, None]
    mx.eval(count)  # evaluated arrays may be used from any thread
    return count


@fused
def _row_keys(count: mx.array, first_row: mx.array, first: mx.array, second: mx.array) -> mx.array:
    return _mix(mx.bitwise_xor(_mix(mx.bitwise_xor(count + first_row, first)), second))


def _mix(x: mx.array) -> mx.array:
    x = mx.bitwise_xor(x, mx.right_shift(x, mx.array(16, mx.uint32))) * mx.array(_MULTIPLIERS[0], mx.uint32)
    x = mx.bitwise_xor(x, mx.right_shift(x, mx.array(15, mx.uint32))) * mx.array(_MULTIPLIERS[1], mx.uint32)
    return mx.bitwise_xor(x, mx.right_shift(x, mx.array(16, mx.uint32)))


_drawn = fused(draw)


def _seed(tensor: int, step: int | mx.array, salt: int) -> tuple[mx.array, mx.array]:
    """Two 32-bit words (uint32 scalars); each depends on all of (tensor, step, salt)."""
    state = 0
    for word in (salt & _MASK, salt >> 32 & _MASK, tensor & _MASK):
        state = _mix_int(state + _GOLDEN & _MASK) ^ word
    if isinstance(step, int):
        for word in (step & _MASK, step >> 32 & _MASK):
            state = _mix_int(state + _GOLDEN & _MASK) ^ word
        first = _mix_int(state)
        return mx.array(first, mx.uint32), mx.array(_mix_int(first + _GOLDEN & _MASK), mx.uint32)
    mixed, golden = mx.array(state, mx.uint32), mx.array(_GOLDEN, mx.uint32)
    whole = step.astype(mx.uint64)
    upper = mx.right_shift(whole, mx.array(32, mx.uint64))
    for half in (mx.bitwise_and(whole, mx.array(_MASK, mx.uint64)), upper):
        mixed = mx.bitwise_xor(_mix(mixed + golden), half.astype(mx.uint32))
    mixed = _mix(mixed)
    return mixed, _mix(mixed + golden)


def _mix_int(x: int) -> int:
    x = (x ^ x >> 16) * _MULTIPLIERS[0] & _MASK
    x = (x ^ x >> 15) * _MULTIPLIERS[1] & _MASK
    return x ^ x >> 16
