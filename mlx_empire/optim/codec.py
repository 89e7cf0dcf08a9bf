"""Decides how moments are kept in 8 bits: a signed square-root code for m, a logarithmic code for v.

Both work on blocks of 64 elements, that is on rows, with one scale per row.

First moment. s = max|m| of the row rounded up to bfloat16; code q = sign(m) floor(127 sqrt(|m| / s) + 1/2),
int8, rounded to nearest; decoded q |q| / 127^2 s. Zero maps to zero; a row with no element above 2^-100 is
stored as zeros. Where m is all there is (Lion, momentum) it is rounded at random without bias: such averages are
slower than AdamW's beta1 = 0.9, and with 0.99 rounding to nearest left m wrong by a tenth.

Second moment. The bit pattern I of a float32 v >= 0 is 2^23 log2(v), piecewise linear and monotone. Over
the elements of a row that are at least 2^-100: floor L = min I with its lower 16 bits cleared (stored as
bfloat16), but at most 32 octaves under max I; step S = 1.002 (max I - L) / 254, stored as float16 in units
of 2^23 and never below 2^-13 of them, hence a whole number. Code c in 1..255 stands for the value whose bit
pattern is L + (c - 1) S; code 0 for v below 2^-100. v is rounded up with probability (v - a) / (b - a)
between its neighbours a and b, so it is unbiased: with beta2 = 0.999 rounding to nearest would stall.
Elements under the floor are raised to it, never zeroed. max I is taken as at most that of 2^120, so that no
code stands for infinity.

Precedents: adaptive log ranges (AL8), unbiased log rounding (LUMA), log codes (SOLO), dithering (BReD).
Everything is a function of one row and its noise, so codes do not depend on how a tensor is cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_empire.optim.fusion import fused
from mlx_empire.optim.noise import column_keys, uniform
from mlx_empire.optim.protocol import State
from mlx_empire.plan.model import BLOCK

TINY = 2.0**-100  # smaller moments are zero
_OCTAVE = 1 << 23  # bit patterns per factor of two
_TOP = (120 + 127) << 23  # the bit pattern of 2^120
_INFINITY = 0x7F800000
_RANGE = 32 * _OCTAVE
_STEPS = 254

ARRAYS: dict[str, dict[str, tuple[int, mx.Dtype]]] = {  # moment -> name -> (columns of a row, dtype)
    "m": {"m_codes": (BLOCK, mx.int8), "m_scale": (1, mx.bfloat16)},
    "v": {"v_codes": (BLOCK, mx.uint8), "v_floor": (1, mx.bfloat16), "v_step": (1, mx.float16)},
}


def empty_codes(rows: int, moments: Sequence[str] = ("m", "v")) -> State:
    """The codes of zero moments of shape (rows, 64): codes are (rows, 64), what a row shares is (rows, 1)."""
    arrays = {name: form for moment in moments for name, form in ARRAYS[moment].items()}
    return {name: mx.zeros((rows, columns), dtype) for name, (columns, dtype) in arrays.items()}


def code_bytes(rows: int, moments: Sequence[str] = ("m", "v")) -> dict[str, int]:
    """Bytes by name of what `empty_codes` makes."""
    arrays = {name: form for moment in moments for name, form in ARRAYS[moment].items()}
    return {name: rows * columns * dtype.size for name, (columns, dtype) in arrays.items()}


def encode(m: mx.array, v: mx.array, keys: mx.array) -> State:
    """Codes of float32 moments (rows, 64), v >= 0; `keys` (rows, 1) from `noise.row_keys`."""
    return {**encode_first(m), **encode_second(v, keys)}


def decode(state: State) -> tuple[mx.array, mx.array]:
    """Float32 (m, v), each (rows, 64), of the codes in `state`."""
    return decode_first(state), decode_second(state)


def decode_first(state: State) -> mx.array:
    """Float32 m (rows, 64) of the codes in `state`."""
    m: mx.array = _first_values(state["m_codes"], first_unit(state))
    return m


# ---- first moment


def encode_first(m: mx.array) -> State:
    """`m_codes` and `m_scale` of float32 m (rows, 64)."""
    peak = mx.max(mx.abs(m), axis=1, keepdims=True)
    scale = _scale_bits(peak, peak.view(mx.uint32)).view(mx.bfloat16)
    return {"m_codes": _first_codes(m, _inverse(scale)), "m_scale": scale}


def encode_lone_first(m: mx.array, keys: mx.array) -> State:
    """As `encode_first`, rounded at random with the same mean; `keys` (rows, 1) from `noise.row_keys`."""
    peak = mx.max(mx.abs(m), axis=1, keepdims=True)
    scale = _scale_bits(peak, peak.view(mx.uint32)).view(mx.bfloat16)
    return {"m_codes": _lone_first_codes(m, _inverse(scale), keys, column_keys()), "m_scale": scale}


def first_unit(state: State) -> mx.array:
    """Float32 (rows, 1): what q |q| = 1 stands for, s / 127^2."""
    unit: mx.array = _unit(state["m_scale"])
    return unit


def first_value(codes: mx.array, unit: mx.array) -> mx.array:
    """Float32 m of int8 codes and `first_unit`. Element-wise, for use in fused functions."""
    q = codes.astype(mx.float32)
    return mx.abs(q) * q * unit


_first_values = fused(first_value)


@fused
def _scale_bits(peak: mx.array, bits: mx.array) -> mx.array:
    upper = mx.right_shift(bits + mx.array(0xFFFF, mx.uint32), mx.array(16, mx.uint32))
    return mx.where(peak < TINY, mx.array(0, mx.uint32), upper).astype(mx.uint16)  # NaN stays visible


@fused
def _inverse(scale: mx.array) -> mx.array:
    s = scale.astype(mx.float32)
    return mx.where(s == 0, mx.array(0.0), 1.0 / s)


@fused
def _unit(scale: mx.array) -> mx.array:
    return scale.astype(mx.float32) * (1.0 / 127**2)


@fused
def _first_codes(m: mx.array, inverse: mx.array) -> mx.array:
    magnitude = (mx.sqrt(mx.abs(m) * inverse) * 127.0 + 0.5).astype(mx.int32)
    return mx.where(m < 0, -magnitude, magnitude).astype(mx.int8)


@fused
def _lone_first_codes(m: mx.array, inverse: mx.array, keys: mx.array, columns: mx.array) -> mx.array:
    share = mx.abs(m) * inverse * (127.0**2)
    below = mx.minimum(mx.floor(mx.sqrt(share)), 126.0)
    chance = (share - below * below) / (2.0 * below + 1.0)
    magnitude = (below + (uniform(keys, columns) < chance).astype(mx.float32)).astype(mx.int32)
    return mx.where(m < 0, -magnitude, magnitude).astype(mx.int8)


# ---- second moment


def encode_second(v: mx.array, keys: mx.array) -> State:
    """`v_codes`, `v_floor` and `v_step` of float32 v (rows, 64); `keys` (rows, 1) from `noise.row_keys`."""
    lowest = mx.min(_or_infinity(v), axis=1, keepdims=True).view(mx.int32)
    highest = mx.max(v, axis=1, keepdims=True).view(mx.int32)
    floor, step = _second_grid(lowest, highest)
    start, stride, inverse = _second_scales(floor, step)
    codes = _second_codes(v, v.view(mx.int32), start, stride, inverse, keys, column_keys())
    return {"v_codes": codes, "v_floor": floor.view(mx.bfloat16), "v_step": step}


def decode_second(state: State) -> mx.array:
    """Float32 v (rows, 64) of the codes in `state`."""
    start, stride, _ = _second_scales(state["v_floor"].view(mx.uint16), state["v_step"])
    v: mx.array = _second_bits(state["v_codes"], start, stride).view(mx.float32)
    return v


@fused
def _or_infinity(v: mx.array) -> mx.array:
    return mx.where(v >= TINY, v, mx.array(float("inf")))


@fused
def _second_grid(lowest: mx.array, highest: mx.array) -> tuple[mx.array, mx.array]:
    """Upper half of the floor's bits (uint16) and step (float16), both (rows, 1), of the extremes' bits."""
    top = mx.minimum(highest, _TOP)
    floor = mx.right_shift(mx.minimum(mx.maximum(lowest, top - _RANGE), top), 16)
    octaves = (top - mx.left_shift(floor, 16)).astype(mx.float32) * (1.002 / _STEPS / _OCTAVE)
    # From 2^-13 on, float16 counts whole multiples of 2^-23: the step in bits is a whole number.
    return floor.astype(mx.uint16), mx.maximum(octaves, 2.0**-13).astype(mx.float16)


@fused
def _second_scales(floor: mx.array, step: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Bits of the floor (int32), the step in bits (int32) and its inverse (float32)."""
    stride = step.astype(mx.float32) * float(_OCTAVE)
    return mx.left_shift(floor.astype(mx.int32), 16), stride.astype(mx.int32), 1.0 / stride


@fused
def _second_bits(codes: mx.array, start: mx.array, stride: mx.array) -> mx.array:
    c = codes.astype(mx.int32)
    return mx.where(c > 0, (c - 1) * stride + start, 0)


@fused
def _second_codes(
    v: mx.array,
    bits: mx.array,
    start: mx.array,
    stride: mx.array,
    inverse: mx.array,
    keys: mx.array,
    columns: mx.array,
) -> mx.array:
    """Stochastic rounding in whole numbers: no neighbour is ever turned into a float.

    `above` and `below` are twice v - a and b - v in units of v's last place. One step is less than an
    octave, so at most one of the neighbours lies in another octave than v, where a bit counts half (below)
    or double (above).
    """
    distance = mx.maximum(bits - start, 0)
    k = mx.minimum((distance.astype(mx.float32) * inverse).astype(mx.int32), _STEPS - 1)
    rest = distance - k * stride
    mantissa = mx.bitwise_and(bits, _OCTAVE - 1)
    above = 2 * rest - mx.maximum(rest - mantissa, 0)
    to_next = stride - rest
    below = 2 * (to_next + mx.maximum(to_next - (_OCTAVE - mantissa), 0))
    up = uniform(keys, columns) * (above + below).astype(mx.float32) < above.astype(mx.float32)
    return mx.where(v >= TINY, k + 1 + up.astype(mx.int32), 0).astype(mx.uint8)
