"""The 8-bit codec against the numpy reference, its bounds, and that it is unbiased."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optim import reference

from mlx_empire.optim import codec, rounding


def moments(rows: int = 2048, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """First and second moments with ranges from none to more than 31 octaves within a row, and odd rows."""
    rng = np.random.default_rng(seed)
    m = (
        rng.normal(size=(rows, 64)) * np.exp(rng.normal(size=(rows, 64)) * rng.uniform(0, 3, (rows, 1)))
    ).astype(np.float32)
    v = np.exp(rng.normal(size=(rows, 64)) * rng.uniform(0, 8, (rows, 1)) - 20).astype(np.float32)
    m[0] = v[0] = 0
    m[1, 1:], v[1, 1:] = 0, 0  # a single element
    m[2] = v[2] = 1e-40  # denormals
    v[3, :32] = 2.0**-100
    v[3, 32:] = np.nextafter(np.float32(2.0**-100), np.float32(0))
    v[4] = 0.125  # constant
    v[5] = 3.3e38  # bfloat16's neighbourhood of infinity
    m[5] = 3.3e38
    v[6, ::2] = 0
    return m, v


def as_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


def encoded(v: np.ndarray, **key: int) -> dict[str, mx.array]:
    arguments = {"tensor": 7, "first_row": 0, "step": 1, "salt": 0} | key
    return codec.encode_second(mx.array(v), rounding.row_keys(v.shape[0], **arguments))


def test_noise_is_the_references() -> None:
    for key in [(7, 0, 1, 0), (2**32 - 1, 2**31 + 5, 123_456, 2**63 + 9), (0, 2**32 - 16, 2**33, 1)]:
        keys = rounding.row_keys(16, *key)
        ours = (np.array(rounding.draw_halves(keys), np.float64) + 0.5) / 2**16
        np.testing.assert_array_equal(ours, reference.noise(16, *key))
        np.testing.assert_array_equal(
            np.array(rounding.draw(keys, rounding.column_keys())), reference.draws(16, *key)
        )


def test_noise_is_uniform_over_steps_rows_and_columns() -> None:
    steps = np.stack([reference.noise(1, 11, 3, t)[0] for t in range(1, 2049)])
    rows = reference.noise(2048, 11, 0, 5)
    for draws in (steps, rows):
        n = draws.size
        assert abs(draws.mean() - 0.5) < 4 * np.sqrt(1 / 12 / n)
        centred = draws - 0.5
        for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
            assert abs((a * b).mean() * 12) < 4 / np.sqrt(a.size)


def test_codes_are_the_references() -> None:
    m, v = moments()
    keys = rounding.row_keys(v.shape[0], 7, 40, 3, 1)
    state = codec.encode(mx.array(m), mx.array(v), keys)
    codes, floor, levels, _ = reference.encode_second(v, reference.noise(v.shape[0], 7, 40, 3, 1))
    np.testing.assert_array_equal(np.array(state["v_floor"]), floor)
    np.testing.assert_array_equal(np.array(state["v_levels"]), levels)
    np.testing.assert_array_equal(np.array(state["v_codes"]), codes)
    # A level's bits are rounded to whole numbers, in float32: up to 2^28 of them, to 24 places, then the floor's.
    exact = reference.decode_second(codes, floor, levels)
    np.testing.assert_allclose(as_numpy(codec.decode_second(state)), exact, rtol=5e-6)
    first, scale = reference.encode_first(m)
    np.testing.assert_array_equal(as_numpy(state["m_scale"]), scale)
    differ = np.array(state["m_codes"]).astype(int) - first
    assert (
        np.abs(differ).max() <= 1
    )  # float32 against float64: only where 127 sqrt(|m| / s) is nearly k + 1/2
    assert np.count_nonzero(differ) <= 1e-4 * differ.size
    decoded = reference.decode_first(np.array(state["m_codes"]), scale)
    np.testing.assert_allclose(as_numpy(codec.decode(state)[0]), decoded, rtol=3e-7)


def test_first_moment_stays_within_its_bound() -> None:
    m, _ = moments()
    state = codec.encode_first(mx.array(m))
    unit = codec.first_unit(state)
    error = np.abs(as_numpy(codec.first_value(state["m_codes"], unit)).astype(np.float64) - m)
    s = as_numpy(state["m_scale"]).astype(np.float64)
    share = np.abs(m) / np.where(s == 0, 1, s)
    bound = s * (np.sqrt(share) / 127 + 1 / (4 * 127**2))
    assert (error <= bound * (1 + 1e-6) + 2.0**-100).all()


def test_second_moment_stays_within_one_level_and_is_never_zeroed() -> None:
    _, v = moments()
    state = encoded(v)
    decoded = as_numpy(codec.decode_second(state)).astype(np.float64)
    floor, levels = reference.second_grid(v)
    least = (floor << 16).astype(np.int32).view(np.float32).astype(np.float64)
    tiny = v < 2.0**-100
    assert (decoded[tiny] == 0).all()
    assert (np.array(state["v_codes"])[~tiny] > 0).all()
    inside = ~tiny & (v >= least) & (v <= 2.0**120)
    # One level up is a factor of at most 1 + 1/n, at the bottom of an octave.
    error = np.abs(decoded / np.where(tiny, 1, v) - 1)
    assert (error <= 1 / levels + 5e-6)[inside].all()
    below = ~tiny & (v < least)
    assert below.any()
    raised = np.broadcast_to(least, v.shape)
    assert (np.abs(decoded - raised) <= (1 / levels + 5e-6) * raised)[below].all()
    assert np.isfinite(decoded).all()


@given(st.integers(0, 2**16 - 1), st.integers(-5, 31 * 128 + 5), st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_rows_of_any_floor_and_span_use_the_codes_and_fit_them(low: int, span: int, seed: int) -> None:
    """The row's least and greatest elements are given by the upper halves of their bits; the rest lies between."""
    least, most = (np.clip(x, 27 << 7, 247 << 7) << 16 for x in (low, low + span))
    rng = np.random.default_rng(seed)
    bits = rng.integers(least, max(most, least) + 1, (1, 64)) + rng.integers(0, 2**16, (1, 64))
    bits[0, :2] = least, max(most, least)
    v = np.minimum(bits, 247 << 23).astype(np.int32).view(np.float32)
    state = encoded(v, step=seed)
    codes, floor, levels, _ = reference.encode_second(v, reference.noise(1, 7, 0, seed))
    np.testing.assert_array_equal(np.array(state["v_codes"]), codes)
    assert codes.min() >= 1
    octaves = (v.view(np.int32).max() - (int(floor[0, 0]) << 16)) / 2**23
    assert (
        levels[0, 0] == 253 or (levels[0, 0] + 1) * (octaves + 2.0**-7) > 253
    )  # no finer grid would span the row
    if octaves > 0.5:
        assert codes.max() - codes.min() >= 253 * min(octaves, 1) * 0.85
    decoded = as_numpy(codec.decode_second(state)).astype(np.float64)
    assert (np.abs(decoded / v - 1) <= 1 / levels + 5e-6).all()


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 9.0])
def test_second_moment_is_unbiased(spread: float) -> None:
    rng = np.random.default_rng(5)
    row = np.exp(spread * rng.normal(size=(1, 64)) - 12).astype(np.float32)
    v = np.repeat(row, 4096, axis=0)  # 4,096 draws of each of 64 elements
    _, floor, levels, p = reference.encode_second(row, np.zeros_like(row))
    codes, *_ = reference.encode_second(row, np.zeros_like(row))  # u = 0: the lower neighbour
    below, above = (reference.level_value(floor, levels, codes.astype(int) - 1 + i) for i in (0, 1))
    inside = row >= (floor << 16).astype(np.int32).view(np.float32)  # others are raised to the floor
    np.testing.assert_allclose((below + p * (above - below))[inside], row[inside], rtol=1e-12)
    for step in (1, 2):
        decoded = as_numpy(codec.decode_second(encoded(v, step=step))).astype(np.float64)
        sigma = (above - below) * np.sqrt(p * (1 - p) / 4096)
        error = np.abs(decoded.mean(axis=0) - row)
        # 2^-17 of a level is what 16 bits of noise leave, on average nothing.
        assert (error <= 4 * sigma + 2.0**-17 * (above - below) + 5e-6 * row)[inside].all()


def test_zero_rows_stay_zero() -> None:
    zeros = mx.zeros((3, 64))
    state = codec.encode(zeros, zeros, rounding.row_keys(3, 1, 0, 1, 0))
    for value in codec.decode(state):
        assert not mx.any(value).item()
    empty = codec.empty_codes(3)
    for value in codec.decode(empty):
        assert not mx.any(value).item()
    assert {n: (a.shape, a.dtype) for n, a in empty.items()} == {
        n: (a.shape, a.dtype) for n, a in state.items()
    }


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF])
def test_nan_is_not_hidden(bits: int) -> None:
    m = np.ones((2, 64), np.float32)
    m.view(np.uint32)[0, 5] = bits
    decoded = codec.decode(
        {**codec.encode_first(mx.array(m)), **codec.encode_second(mx.abs(mx.array(m)), _keys(2))}
    )
    first = np.array(decoded[0])
    assert np.isnan(first[0]).all()
    np.testing.assert_allclose(first[1], 1, rtol=1e-6)


def _keys(rows: int) -> mx.array:
    return rounding.row_keys(rows, 1, 0, 1, 0)


def test_rows_beyond_the_index_are_refused() -> None:
    with pytest.raises(ValueError, match="2\\*\\*38"):
        rounding.row_keys(2, 0, 2**32 - 1, 1, 0)
