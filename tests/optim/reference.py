"""The optimizer once more, in plain numpy: the textbook's AdamW in float64, exact masters, the 8-bit codec.

Written from the published formulas for readers and tests, not for speed. Blocks are rows of 64 elements.
"""

from __future__ import annotations

import numpy as np

TINY = 2.0**-100
OCTAVE = 1 << 23


# ---- AdamW (Loshchilov and Hutter, 2019, algorithm 2), float64


def adamw(w, m, v, g, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """One step in float64; returns w, m, v."""
    b1, b2 = betas
    w, m, v, g = (np.asarray(x, np.float64) for x in (w, m, v, g))
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    direction = m / (1 - b1**step) / (np.sqrt(v / (1 - b2**step)) + eps)
    return w * (1 - lr * weight_decay) - lr * direction, m, v


# ---- Lion (Chen et al., 2023, algorithm 2) and SGD with momentum (Polyak), float64


def lion(w, m, g, lr, betas=(0.9, 0.99), weight_decay=0.0):
    """One step in float64; returns w, m and the interpolation whose sign is taken."""
    w, m, g = (np.asarray(x, np.float64) for x in (w, m, g))
    c = betas[0] * m + (1 - betas[0]) * g
    return w * (1 - lr * weight_decay) - lr * np.sign(c), betas[1] * m + (1 - betas[1]) * g, c


def sgd(w, m, g, lr, momentum=0.9, weight_decay=0.0):
    """One step in float64; returns w, m."""
    w, m, g = (np.asarray(x, np.float64) for x in (w, m, g))
    m = momentum * m + g
    return w * (1 - lr * weight_decay) - lr * m, m


# ---- masters


def split(master):
    """float32 -> (bits of the bfloat16 weight as uint16, remainder int16)."""
    b = np.asarray(master, np.float32).view(np.uint32).astype(np.uint64)
    upper = ((b + 0x8000) % 2**32) >> 16
    remainder = (b.astype(np.int64) - (upper << 16).astype(np.int64) + 2**31) % 2**32 - 2**31
    return upper.astype(np.uint16), remainder.astype(np.int16)


def join(upper, remainder):
    """The inverse of `split`."""
    b = (upper.astype(np.int64) << 16) + remainder.astype(np.int64)
    return (b % 2**32).astype(np.uint32).view(np.float32)


def bf16_copy(master):
    """The bfloat16 neighbour of float32 weights (nearest, ties away from zero), as float32."""
    return (split(master)[0].astype(np.uint32) << 16).view(np.float32)


def rounded_bits(master, draws, lost):
    """float32 bits (uint64) rounded to a multiple of 2^lost: up where the lost bits and the draw's carry."""
    b = np.asarray(master, np.float32).view(np.uint32).astype(np.uint64)
    below = np.uint64((1 << lost) - 1)
    return (b + (draws.astype(np.uint64) & below)) & ~below


def split_diet(master, draws):
    """float32 -> (bits of the bfloat16 weight as uint16, remainder int8), 24 bits in all."""
    kept = rounded_bits(master, draws, 8).astype(np.uint32).view(np.float32)
    upper, remainder = split(kept)
    assert (remainder % 256 == 0).all()
    return upper, (remainder // 256).astype(np.int8)


# ---- noise


def mix(x):
    """Wellons' 32-bit mixer on uint64 arrays that hold 32-bit words."""
    x = np.asarray(x, np.uint64)
    x = (x ^ x >> np.uint64(16)) * np.uint64(0x7FEB352D) & np.uint64(0xFFFFFFFF)
    x = (x ^ x >> np.uint64(15)) * np.uint64(0x846CA68B) & np.uint64(0xFFFFFFFF)
    return x ^ x >> np.uint64(16)


def noise(rows, tensor, first_row, step, salt=0):
    """(rows, 64) float64 in (0, 1): the draw of every element, odd multiples of 2^-17; two from one hash."""
    pairs = mix(_keyed(rows, tensor, first_row, step, salt, range(64, 96))).astype(np.uint32)
    return (pairs.view(np.uint16) + 0.5) / 2.0**16


def _keyed(rows, tensor, first_row, step, salt, columns):
    golden, mask = 0x9E3779B9, 0xFFFFFFFF
    state = 0
    for word in (salt & mask, salt >> 32 & mask, tensor & mask, step & mask, step >> 32 & mask):
        state = int(mix((state + golden) & mask)) ^ word
    first = int(mix(state))
    second = int(mix((first + golden) & mask))
    row = np.arange(first_row, first_row + rows, dtype=np.uint64)[:, None]
    column = np.array(columns, np.uint64)[None]
    key = mix(mix(row ^ np.uint64(first)) ^ np.uint64(second))
    return (key + column * np.uint64(golden)) & np.uint64(mask)


def draws(rows, tensor, first_row, step, salt=0):
    """(rows, 64) uint64: the 32 bits that a lossy master draws for every element."""
    return mix(_keyed(rows, tensor, first_row, step, salt, range(64)))


# ---- first moment: signed square root, nearest


def bf16_up(x):
    """Positive float32 rounded up to the next bfloat16, as float32."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) >> np.uint32(16) << np.uint32(16)).view(np.float32)


def encode_first(m):
    """(codes int8, scale float32 (rows, 1))."""
    peak = np.abs(m).max(axis=1, keepdims=True)
    scale = np.where(peak < TINY, np.float32(0), bf16_up(peak))
    share = np.abs(m.astype(np.float64)) / np.where(scale == 0, np.inf, scale.astype(np.float64))
    return (np.sign(m) * np.floor(127 * np.sqrt(share) + 0.5)).astype(np.int8), scale


def encode_lone_first(m, u):
    """(codes int8, scale float32 (rows, 1), p): m alone, rounded at random; p is the chance of the larger code."""
    _, scale = encode_first(m)
    share = np.abs(m.astype(np.float64)) / np.where(scale == 0, np.inf, scale.astype(np.float64)) * 127**2
    q = np.minimum(np.floor(np.sqrt(share)), 126)
    p = (share - q * q) / (2 * q + 1)
    return (np.sign(m) * (q + (u < p))).astype(np.int8), scale, p


def decode_first(codes, scale):
    q = codes.astype(np.float64)
    return q * np.abs(q) / 127**2 * scale


# ---- second moment: levels within octaves, stochastic


def second_grid(v):
    """(floor: the upper half of its bits, levels in an octave), int64, both (rows, 1)."""
    bits = v.astype(np.float32).view(np.int32).astype(np.int64)
    highest = np.minimum(bits.max(axis=1, keepdims=True), (120 + 127) << 23)
    lowest = np.where(v >= TINY, bits, 2**40).min(axis=1, keepdims=True)
    floor = np.minimum(np.maximum(lowest, highest - 31 * OCTAVE), highest) >> 16
    span = -((highest - (floor << 16)) // -(1 << 16))  # 128ths of an octave, rounded up
    return floor, 253 * 128 // np.maximum(span, 128)


def level_value(floor, levels, k):
    """Float64 value of the k-th level, counted from the floor's."""
    octave, place = floor >> 7, ((floor & 127) * levels >> 7) + k
    return np.ldexp(1 + place % levels / levels, (octave - 127 + place // levels).astype(int))


def encode_second(v, u):
    """(codes uint8, floor, levels, p): p is the chance of the larger code, which has it where u >= 1 - p."""
    floor, levels = second_grid(v)
    least, most = ((x << 16).astype(np.int32).view(np.float32) for x in (floor, np.array((120 + 127) << 7)))
    inside = np.clip(v, least, most).astype(np.float64)
    mantissa, exponent = np.frexp(inside)  # inside = 2 mantissa 2^(exponent - 1)
    place = (exponent - 1 + 127 - (floor >> 7) + (2 * mantissa - 1)) * levels  # exact, in float64
    k = np.floor(place).astype(np.int64)
    codes = k - ((floor & 127) * levels >> 7) + (u >= 1 - (place - k)) + 1
    return np.where(v >= TINY, codes, 0).astype(np.uint8), floor, levels, place - k


def decode_second(codes, floor, levels):
    """Float64."""
    return np.where(codes > 0, level_value(floor, np.maximum(levels, 1), codes.astype(np.int64) - 1), 0)
