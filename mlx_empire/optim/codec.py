"""Decides how moments are kept in 8 bits: a signed square-root code for m, a logarithmic code for v.

Both work on blocks of 64 elements, that is on rows, with one scale per row.

First moment. s = max|m| of the row rounded up to bfloat16; code q = sign(m) floor(127 sqrt(|m| / s) + 1/2),
int8, rounded to nearest; decoded q |q| / 127^2 s. Zero maps to zero; a row with no element above 2^-100 is
stored as zeros. Where m is all there is (Lion, momentum) it is rounded at random without bias: such averages are
slower than AdamW's beta1 = 0.9, and with 0.99 rounding to nearest left m wrong by a tenth.

Second moment. Codes are a small floating-point format: each octave (factor of two) has n equally spaced levels, and a
row keeps n (8 to 253) and its floor. The bit pattern I of a float32 v >= 0 is 2^23 log2(v), exact at whole octaves
and linear between them, so with b the bits of the octave that the floor lies in, level I n / 2^23 counted from b is
linear in v between neighbouring levels: rounding (I - b) n / 2^23 at random without bias, in whole numbers, rounds v
without bias. That matters: with beta2 = 0.999 rounding to nearest would stall.
- The floor is the least element that is at least 2^-100, its bits' lower half cleared, but at most 31 octaves under
  the greatest; n is the largest that spans the row in 253 steps.
- Code c in 1..255 stands for the c-th level from the floor's; code 0 for v below 2^-100. Elements under the floor are
  raised to it, never zeroed. The greatest counts as at most 2^120, so that no code stands for infinity.

Precedents: adaptive log ranges (AL8), unbiased log rounding (LUMA), log codes (SOLO), dithering (BReD).
Everything is a function of one row and its noise, so codes do not depend on how a tensor is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_empire.model.spec import BLOCK
from mlx_empire.optim.compile import fused
from mlx_empire.optim.protocol import State
from mlx_empire.optim.rounding import draw_halves

TINY = 2.0**-100  # smaller moments are zero
_TINY_BITS = (127 - 100) << 23
_INFINITY, _NAN = 0x7F800000, 0x7FC00000
_TOP = (120 + 127) << 23  # the bit pattern of 2^120
_RANGE = 31 << 23  # 32 would leave seven levels to an octave, and each 14 % above the last
_STEPS = 253  # of the 254 between codes 1 and 255 one is left for rounding up

ARRAYS: dict[str, dict[str, tuple[int, mx.Dtype]]] = {  # moment -> name -> (columns of a row, dtype)
    "m": {"m_codes": (BLOCK, mx.int8), "m_scale": (1, mx.bfloat16)},
    "v": {"v_codes": (BLOCK, mx.uint8), "v_floor": (1, mx.uint16), "v_levels": (1, mx.uint8)},
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
    """Codes of float32 moments (rows, 64), v >= 0; `keys` (rows, 1) from `rounding.row_keys`."""
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
    scale = _scale_of(m)
    return {"m_codes": _first_codes(m, _inverse(scale)), "m_scale": scale}


def encode_lone_first(m: mx.array, keys: mx.array) -> State:
    """As `encode_first`, rounded at random with the same mean; `keys` (rows, 1) from `rounding.row_keys`."""
    scale = _scale_of(m)
    return {"m_codes": _lone_first_codes(m, _inverse(scale), draw_halves(keys)), "m_scale": scale}


def first_unit(state: State) -> mx.array:
    """Float32 (rows, 1): what q |q| = 1 stands for, s / 127^2."""
    unit: mx.array = _unit(state["m_scale"])
    return unit


def first_value(codes: mx.array, unit: mx.array) -> mx.array:
    """Float32 m of int8 codes and `first_unit`. Element-wise, for use in fused functions."""
    q = codes.astype(mx.float32)
    return mx.abs(q) * q * unit


_first_values = fused(first_value)


def _scale_of(m: mx.array) -> mx.array:
    magnitude = mx.max(_magnitudes(*_parts(m.view(mx.int32))), axis=1, keepdims=True)
    scale: mx.array = _scale_bits(magnitude).view(mx.bfloat16)
    return scale


def _parts(bits: mx.array) -> list[mx.array]:
    """Rows in eight parts. One kernel over the parts reads all of a row and writes an eighth of it; what is left for a
    reduction, which is a kernel of its own, is little."""
    width = BLOCK // 8
    return [bits[:, i : i + width] for i in range(0, BLOCK, width)]


def _in_pairs(combine: Callable[[mx.array, mx.array], mx.array], parts: Sequence[mx.array]) -> mx.array:
    """All parts as one, in few operations after each other (see `fused`); their number is a power of two."""
    while len(parts) > 1:
        parts = [combine(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


@fused
def _magnitudes(*bits: mx.array) -> mx.array:
    """The greatest bits of the parts without their sign: bits order magnitudes."""
    return _in_pairs(mx.maximum, [mx.bitwise_and(part, 0x7FFFFFFF) for part in bits])


@fused
def _scale_bits(magnitude: mx.array) -> mx.array:
    """Upper half (uint16) of the bits of the largest magnitude, rounded up; NaN stays visible."""
    magnitude = mx.minimum(magnitude, _NAN)  # some NaN would be rounded up into the sign
    upper = mx.right_shift(magnitude.astype(mx.uint32) + _u(0xFFFF), _u(16))
    return mx.where(magnitude < _TINY_BITS, _u(0), upper).astype(mx.uint16)


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
def _lone_first_codes(m: mx.array, inverse: mx.array, noise: mx.array) -> mx.array:
    share = mx.abs(m) * inverse * (127.0**2)
    below = mx.minimum(mx.floor(mx.sqrt(share)), 126.0)
    chance = (share - below * below) / (2.0 * below + 1.0)
    up = (noise.astype(mx.float32) + 0.5) * 2.0**-16 < chance
    magnitude = (below + up.astype(mx.float32)).astype(mx.int32)
    return mx.where(m < 0, -magnitude, magnitude).astype(mx.int8)


# ---- second moment


def encode_second(v: mx.array, keys: mx.array) -> State:
    """`v_codes`, `v_floor` and `v_levels` of float32 v (rows, 64); `keys` (rows, 1) from `rounding.row_keys`."""
    bits = v.view(mx.int32)
    lowest, highest = _extremes(*_parts(bits))
    lowest, highest = mx.min(lowest, axis=1, keepdims=True), mx.max(highest, axis=1, keepdims=True)
    floor, levels = _second_grid(lowest, highest)
    codes = _second_codes(bits, *_second_origin(floor, levels), draw_halves(keys))
    return {"v_codes": codes, "v_floor": floor, "v_levels": levels}


def decode_second(state: State) -> mx.array:
    """Float32 v (rows, 64) of the codes in `state`."""
    v: mx.array = _second_bits(state["v_codes"], *_second_scales(state["v_floor"], state["v_levels"]))
    return v.view(mx.float32)


@fused
def _extremes(*bits: mx.array) -> tuple[mx.array, mx.array]:
    """The least bits of the parts that are not tiny (infinity's where all are), and the greatest."""
    lowest = _in_pairs(mx.minimum, [mx.where(part >= _TINY_BITS, part, _INFINITY) for part in bits])
    highest = _in_pairs(mx.maximum, bits)
    # The least one is no greater than the greatest; naming it makes one kernel of both, see `master`.
    return lowest, mx.maximum(highest, mx.where(lowest == _INFINITY, highest, lowest))


@fused
def _second_grid(lowest: mx.array, highest: mx.array) -> tuple[mx.array, mx.array]:
    """Upper half of the floor's bits (uint16) and levels in an octave (uint8), (rows, 1), of the extremes' bits."""
    top = mx.minimum(highest, _TOP)
    floor = mx.right_shift(mx.minimum(mx.maximum(lowest, top - _RANGE), top), 16)
    span = mx.right_shift(top - mx.left_shift(floor, 16) + 0xFFFF, 16)  # in 128ths of an octave, rounded up
    # At least 1 / span lies between a quotient and the next whole number: more than float32 can blur.
    levels = (_STEPS * 128.0) / mx.maximum(span, 128).astype(mx.float32)
    return floor.astype(mx.uint16), levels.astype(mx.uint8)


@fused
def _second_scales(floor: mx.array, levels: mx.array) -> tuple[mx.array, mx.array]:
    """Bits of code 1's value (int32) and bits from one level to the next (float32)."""
    octave, level = _floor_level(floor, levels)
    stride = float(1 << 23) / mx.maximum(levels.astype(mx.float32), 1.0)
    return octave.astype(mx.int32) + _whole(level.astype(mx.float32) * stride), stride


@fused
def _second_origin(floor: mx.array, levels: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Bits of the floor (int32), n (uint32) and code 0's place on the scale I n / 2^23 (uint32, in units of 2^-23).

    The scale is too long for 32 bits. Places in a row are less than 2^9 from its code 0: they are right modulo 2^9.
    """
    octave, level = _floor_level(floor, levels)
    n = levels.astype(mx.uint32)
    return mx.left_shift(floor.astype(mx.int32), 16), n, octave * n + _octaves(level) - _octaves(_u(1))


def _floor_level(floor: mx.array, levels: mx.array) -> tuple[mx.array, mx.array]:
    """The bits of the octave that the floor (its upper 16 bits) lies in, and the floor's level there; uint32."""
    floor = floor.astype(mx.uint32)
    level = mx.right_shift(mx.bitwise_and(floor, _u(127)) * levels.astype(mx.uint32), _u(7))
    return _octaves(mx.right_shift(floor, _u(7))), level


def _octaves(count: mx.array) -> mx.array:
    return mx.left_shift(count, _u(23))


def _whole(x: mx.array) -> mx.array:
    """The nearest whole number (int32) of a float32 x >= 0."""
    return (x + 0.5).astype(mx.int32)


def _u(number: int) -> mx.array:
    return mx.array(number, mx.uint32)


@fused
def _second_bits(codes: mx.array, start: mx.array, stride: mx.array) -> mx.array:
    c = codes.astype(mx.int32)
    return mx.where(c > 0, start + _whole((c - 1).astype(mx.float32) * stride), 0)


@fused
def _second_codes(
    bits: mx.array, floor: mx.array, levels: mx.array, origin: mx.array, noise: mx.array
) -> mx.array:
    inside = mx.maximum(mx.minimum(bits, _TOP), floor).astype(mx.uint32)
    # The middle of 2^16 equal parts of a level, so that a code is as often too high as too low.
    jitter = mx.left_shift(noise.astype(mx.uint32), _u(7)) + _u(64)
    code = mx.right_shift(inside * levels - origin + jitter, _u(23))
    return mx.where(bits >= _TINY_BITS, code, _u(0)).astype(mx.uint8)
