"""Masters: exact ones lose nothing, lossy ones are the reference's and unbiased, and what is not finite stays so."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from optim import reference

from mlx_empire.optim import master, rounding


def patterns(kind: str, count: int = 2_000_000) -> np.ndarray:
    """Bit patterns of float32 weights as uint32; `count` of those at random."""
    rng = np.random.default_rng(0)
    if kind == "random":
        return rng.integers(0, 2**32, count, dtype=np.uint32)
    if kind == "all lower halves":  # with ties, for weights of every sign and size, denormals and the maximum
        upper = np.array([0, 1, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x7F7E, 0x7F7F, 0x7F80], np.uint32)
        upper = np.concatenate([upper, upper | 0x8000])
        return (upper[:, None] << 16 | np.arange(2**16, dtype=np.uint32)).reshape(-1)
    return np.arange(2**16, dtype=np.uint32) << 16  # every bfloat16


@pytest.mark.parametrize("kind", ["random", "all lower halves", "every bfloat16"])
def test_every_bit_pattern_comes_back(kind: str) -> None:
    bits = patterns(kind, 10_000_000)
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


KEY = (7, 40, 3, 1)  # tensor, first row, step, salt


@pytest.mark.parametrize("kind", ["random", "all lower halves", "every bfloat16"])
def test_lossy_masters_are_the_references(kind: str) -> None:
    bits = patterns(kind).reshape(-1, 64)
    values = bits.view(np.float32)
    rows = bits.shape[0]
    keys, draws = rounding.row_keys(rows, *KEY), reference.draws(rows, *KEY)
    diet, kept = master.parted(mx.array(bits).view(mx.float32), "diet", keys)
    none, nothing = master.parted(mx.array(bits).view(mx.float32), "none", keys)
    assert (diet.dtype, kept["short_remainder"].dtype, none.dtype, nothing) == (
        mx.bfloat16,
        mx.int8,
        mx.bfloat16,
        {},
    )
    joined = np.array(master.joined(diet, kept).view(mx.uint32))
    upper = np.array(none.view(mx.uint16)).astype(np.uint32) << 16
    finite = np.isfinite(values)
    np.testing.assert_array_equal(joined[finite], reference.rounded_bits(values, draws, 8)[finite])
    np.testing.assert_array_equal(upper[finite], reference.rounded_bits(values, draws, 16)[finite])
    expected_upper, expected_remainder = reference.split_diet(np.where(finite, values, 0), draws)
    np.testing.assert_array_equal(np.array(diet.view(mx.uint16))[finite], expected_upper[finite])
    np.testing.assert_array_equal(np.array(kept["short_remainder"])[finite], expected_remainder[finite])
    for back in (joined.view(np.float32), upper.view(np.float32)):
        np.testing.assert_array_equal(np.isnan(back), np.isnan(values))
        infinite = np.isinf(values)
        np.testing.assert_array_equal(back[infinite], values[infinite])


@pytest.mark.parametrize(("kind", "lost"), [("diet", 8), ("none", 16)])
def test_lossy_masters_are_unbiased_and_within_one_step(kind: str, lost: int) -> None:
    rng = np.random.default_rng(3)
    row = (rng.normal(size=(1, 64)) * np.exp(4 * rng.normal(size=(1, 64)))).astype(np.float32)
    draws = 4096
    keys = rounding.row_keys(draws, *KEY)
    weights, kept = master.parted(mx.array(np.repeat(row, draws, axis=0)), kind, keys)
    back = np.array(master.joined(weights, kept), np.float64)
    bits = row.view(np.uint32).astype(np.int64)
    below = (bits >> lost << lost).astype(np.uint32).view(np.float32).astype(np.float64)
    above = ((bits >> lost << lost) + (1 << lost)).astype(np.uint32).view(np.float32).astype(np.float64)
    assert ((back == below) | (back == above)).all()
    chance = (row - below) / (above - below)
    sigma = np.abs(above - below) * np.sqrt(chance * (1 - chance) / draws)
    assert (np.abs(back.mean(axis=0) - row) <= 4 * sigma + 1e-12).all()


def test_a_whole_copy_is_kept_whole_beside_the_same_weights_as_exact() -> None:
    values = mx.array(patterns("random").reshape(-1, 64)).view(mx.float32)
    weights, kept = master.parted(values, "fp32", None)
    assert mx.array_equal(kept["master"].view(mx.uint32), values.view(mx.uint32)).item()
    exact, _ = master.split(values)
    assert mx.array_equal(weights.view(mx.uint16), exact.view(mx.uint16)).item()


@pytest.mark.parametrize("kind", master.KINDS)
def test_every_kind_starts_as_the_bf16_checkpoint(kind: str) -> None:
    weights = mx.array(np.random.default_rng(2).normal(size=(8, 64))).astype(mx.bfloat16)
    kept = master.first_state(weights, kind)
    assert mx.array_equal(master.joined(weights, kept), weights.astype(mx.float32)).item()
    again, kept_again = master.parted(master.joined(weights, kept), kind, rounding.row_keys(8, *KEY))
    assert mx.array_equal(again, weights).item()
    assert {n: (a.dtype, a.shape) for n, a in kept.items()} == {
        n: (a.dtype, a.shape) for n, a in kept_again.items()
    }
