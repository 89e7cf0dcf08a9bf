"""Exact masters: every bit pattern comes back, and the bf16 weight is the nearest one."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from optim import reference

from mlx_empire.optim import master


def patterns(kind: str) -> np.ndarray:
    """Bit patterns of float32 weights as uint32."""
    rng = np.random.default_rng(0)
    if kind == "random":
        return rng.integers(0, 2**32, 2_000_000, dtype=np.uint32)
    if kind == "all lower halves":  # with ties, for weights of every sign and size, denormals and the maximum
        upper = np.array([0, 1, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x7F7E, 0x7F7F, 0x7F80], np.uint32)
        upper = np.concatenate([upper, upper | 0x8000])
        return (upper[:, None] << 16 | np.arange(2**16, dtype=np.uint32)).reshape(-1)
    return np.arange(2**16, dtype=np.uint32) << 16  # every bfloat16


@pytest.mark.parametrize("kind", ["random", "all lower halves", "every bfloat16"])
def test_every_bit_pattern_comes_back(kind: str) -> None:
    bits = patterns(kind)
    upper, remainder = master.split(mx.array(bits).view(mx.float32))
    assert upper.dtype == mx.bfloat16
    assert remainder.dtype == mx.int16
    expected_upper, expected_remainder = reference.split(bits.view(np.float32))
    np.testing.assert_array_equal(np.array(upper.view(mx.uint16)), expected_upper)
    np.testing.assert_array_equal(np.array(remainder), expected_remainder)
    np.testing.assert_array_equal(np.array(master.join(upper, remainder).view(mx.uint32)), bits)
    np.testing.assert_array_equal(reference.join(expected_upper, expected_remainder).view(np.uint32), bits)


def test_the_weight_is_the_nearest_bfloat16() -> None:
    values = np.random.default_rng(1).normal(size=100_000).astype(np.float32)
    upper, _ = master.split(mx.array(values))
    ours = np.abs(np.array(upper.astype(mx.float32)) - values)
    theirs = np.abs(np.array(mx.array(values).astype(mx.bfloat16).astype(mx.float32)) - values)
    np.testing.assert_array_equal(ours, theirs)


def test_a_bf16_checkpoint_starts_without_remainder() -> None:
    weights = mx.array(np.random.default_rng(2).normal(size=(8, 64))).astype(mx.bfloat16)
    upper, remainder = master.split(weights.astype(mx.float32))
    assert mx.array_equal(upper, weights).item()
    assert not mx.any(remainder).item()
