"""The loss of a chunk of logits and its gradient against numpy in float64, also where exponentials could overflow."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.references import our_losses, stock_losses


def in_float64(logits, targets, mask, total):
    """(losses by row, gradient of their sum by the logits)."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    normaliser = np.exp(shifted).sum(axis=-1, keepdims=True)
    log_p = shifted - np.log(normaliser)
    t = targets[..., None]
    losses = -np.take_along_axis(log_p, t, axis=-1)[..., 0]
    gradient = np.exp(log_p)
    np.put_along_axis(gradient, t, np.take_along_axis(gradient, t, axis=-1) - 1, axis=-1)
    return (losses * mask).sum(axis=1) / total, gradient * (mask / total)[..., None]


def ours(logits, targets, mask, total):
    """The same by `our_losses`."""
    given = mx.array(targets), mx.array(mask), mx.array(float(total))

    def summed(wide):
        by_row = our_losses(wide, *given)
        return by_row.sum(), by_row

    (_, by_row), gradient = mx.value_and_grad(summed)(mx.array(logits))
    return np.array(by_row), np.array(gradient)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 3),
    width=st.integers(1, 5),
    vocabulary=st.sampled_from([1, 2, 7, 301]),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 3e3, 1e30]),
)
def test_it_is_the_textbooks(seed, rows, width, vocabulary, spread):
    random = np.random.default_rng(seed)
    logits = (random.normal(size=(rows, width, vocabulary)) * spread).astype(np.float32)
    targets = random.integers(0, vocabulary, (rows, width)).astype(np.int32)
    mask = (random.random((rows, width)) < 0.7).astype(np.float32)
    losses, gradient = ours(logits, targets, mask, 5)
    expected_losses, expected_gradient = in_float64(logits, targets, mask, 5)
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-6, atol=1e-6 * max(spread, 1))
    np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-5, atol=2e-7)


def test_it_is_as_close_to_the_truth_as_mlx_own():
    random = np.random.default_rng(0)
    logits = (random.normal(size=(2, 64, 5000)) * 4).astype(np.float32)
    targets, mask = random.integers(0, 5000, (2, 64)).astype(np.int32), np.ones((2, 64), np.float32)
    expected, _ = in_float64(logits, targets, mask, 128)
    given = mx.array(logits), mx.array(targets), mx.array(mask), mx.array(128.0)
    errors = [np.abs(np.array(f(*given)) / expected - 1).max() for f in (our_losses, stock_losses)]
    assert errors[0] <= max(errors[1], 3e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_visible(bad):
    logits = np.zeros((1, 3, 4), np.float32)
    logits[0, 1, 2] = bad
    losses, gradient = ours(logits, np.zeros((1, 3), np.int32), np.ones((1, 3), np.float32), 3)
    assert not np.isfinite(losses).all()
    assert not np.isfinite(gradient).all()


def test_bfloat16_logits_get_a_bfloat16_gradient():
    logits = mx.random.normal((1, 3, 8)).astype(mx.bfloat16)
    targets, mask = mx.array([[1, 2, 3]]), mx.ones((1, 3))
    gradient = mx.grad(lambda wide: our_losses(wide, targets, mask, mx.array(3.0)).sum())(logits)
    assert gradient.dtype == mx.bfloat16
    _, expected = in_float64(np.array(logits.astype(mx.float32)), np.array(targets), np.ones((1, 3)), 3)
    np.testing.assert_allclose(np.array(gradient.astype(mx.float32)), expected, rtol=2**-8, atol=1e-6)
