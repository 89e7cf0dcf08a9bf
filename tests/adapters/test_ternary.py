"""Ternary weights as MLX stores them, against numpy that knows nothing of MLX."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_empire.model.quantize import QUANT_FORMATS, quantize, ternary


def unpacked(codes, scales, biases, group):
    """MLX's affine format of 2 bits undone by hand: sixteen codes in a word, the first in its lowest bits."""
    words = np.array(codes)
    digits = (words[..., None] >> np.arange(0, 32, 2, dtype=np.uint32)) & 3
    values = digits.reshape(*words.shape[:-1], -1).astype(np.float32)
    spread = [np.repeat(np.array(a.astype(mx.float32)), group, axis=-1) for a in (scales, biases)]
    return digits, values * spread[0] + spread[1]


def absmean(weights, group, round_scale=lambda s: s):
    """The definition, one group at a time, in float64 but for the scale."""
    result = np.zeros_like(weights, np.float64)
    for row, out in zip(weights.reshape(-1, group), result.reshape(-1, group), strict=True):
        s = float(round_scale(np.abs(row.astype(np.float64)).mean()))
        out[:] = [s * min(1, max(-1, np.rint(w / s))) if s else 0.0 for w in row.astype(np.float64)]
    return result


@pytest.mark.parametrize("shape", [(5, 128), (3, 4, 192)])
def test_float32_weights_become_what_numpy_makes_of_them(shape):
    weights = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    weights[0, ..., :64] = 0  # a group without any weight
    packed = ternary(mx.array(weights), 64)
    digits, values = unpacked(*packed, 64)
    assert set(np.unique(digits)) == {0, 1, 2}
    expected = absmean(weights, 64)
    assert np.abs(values - expected).max() < 1e-6
    assert (values == 0).mean() == (expected == 0).mean() > 0.2
    assert np.array_equal(np.array(mx.dequantize(*packed, 64, 2)), values)


def test_bfloat16_weights_are_exactly_minus_s_zero_and_plus_s():
    weights = mx.random.normal((16, 256), key=mx.random.key(1)).astype(mx.bfloat16)
    codes, scales, biases = quantize(weights, QUANT_FORMATS["ternary"])
    assert scales.dtype == biases.dtype == mx.bfloat16
    _, values = unpacked(codes, scales, biases, 64)
    wide = np.array(weights.astype(mx.float32))
    expected = absmean(wide, 64, lambda s: mx.array(s, mx.float32).astype(mx.bfloat16).item())
    assert np.array_equal(values, expected.astype(np.float32))
    assert np.array_equal(values, np.array(mx.dequantize(codes, scales, biases, 64, 2).astype(mx.float32)))


def test_the_stock_kernel_multiplies_them():
    weights, x = mx.random.normal((32, 128)), mx.random.normal((3, 128))
    codes, scales, biases = quantize(weights, QUANT_FORMATS["ternary"])
    found = mx.quantized_matmul(x, codes, scales, biases, transpose=True, group_size=64, bits=2)
    expected = np.array(x).astype(np.float64) @ absmean(np.array(weights), 64).T
    assert np.abs(np.array(found) - expected).max() < 1e-4


@pytest.mark.parametrize("bits", QUANT_FORMATS)
def test_a_packed_tensor_has_the_planned_shapes(bits):
    packing = QUANT_FORMATS[bits]
    codes, scales, *biases = quantize(mx.random.normal((4, 8, 128)), packing)
    assert codes.shape == (4, 8, 128 * packing.bits // 32)
    assert scales.shape == (4, 8, 128 // packing.group)
    assert len(biases) == packing.has_biases
