"""Learning from a teacher: loss and gradient against numpy in float64, and steps against the whole model's own.

The reference knows nothing of ours: it takes logarithms of whole softmaxes in float64, and its gradient is that of the
formula's two sums, each by the chain rule of a softmax, p - q, with the tail as one event.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.references import reference_gradients
from support.stepping import TAUGHT, Case, batches_of, counted_tokens, gathered_gradients, trainer_of

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.model.distillation import Distillation, likeliest
from mlx_empire.model.head_loss import row_losses


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def in_float64(logits, targets, mask, total, how, ids, logs):
    """(cross-entropies by row, divergences by row, gradient of the mixed loss by the logits), event by event."""
    wide, (rows, width, vocabulary) = logits.astype(np.float64), logits.shape
    ce, kl, gradient = np.zeros(rows), np.zeros(rows), np.zeros_like(wide)
    for row in range(rows):
        for at in range(width):
            weight, t = mask[row, at] / total, targets[row, at]
            log_q, plain = log_softmax(wide[row, at] / how.temperature), log_softmax(wide[row, at])
            p = np.exp(logs[row, at].astype(np.float64))
            p /= p.sum()
            known = ids[row, at]
            tail = np.setdiff1d(np.arange(vocabulary), known)
            q_rest = np.exp(log_q[tail]).sum()
            ce[row] -= plain[t] * weight
            events = np.append(log_q[known], np.log(q_rest))
            kl[row] += weight * np.sum(p[p > 0] * (np.log(p[p > 0]) - events[p > 0]))
            # d log q_i / d scaled = onehot(i) - q;  d log q_rest / d scaled = q in the tail / q_rest - q.
            by_scaled = np.exp(log_q) * p.sum()
            by_scaled[known] -= p[:-1]
            by_scaled[tail] -= p[-1] * np.exp(log_q[tail]) / q_rest
            by_plain = np.exp(plain)
            by_plain[t] -= 1
            mixed = (1 - how.weight) * by_plain + how.weight * how.temperature * by_scaled
            gradient[row, at] = weight * mixed
    return ce, kl, gradient


def ours(logits, targets, mask, total, how, ids, logs):
    given = mx.array(targets), mx.array(mask), mx.array(float(total)), (how, mx.array(ids), mx.array(logs))

    def summed(wide):
        by_row, surrogate = row_losses(wide, *given)
        return surrogate.sum(), by_row

    (_, by_row), gradient = mx.value_and_grad(summed)(mx.array(logits))
    return np.array(by_row), np.array(gradient)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    top=st.sampled_from([1, 4, 6]),
    vocabulary=st.sampled_from([7, 301]),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    weight=st.sampled_from([0.3, 1.0]),
)
def test_it_is_the_formula_in_float64(seed, top, vocabulary, spread, temperature, weight):
    random, how = np.random.default_rng(seed), Distillation(weight, temperature, top)
    logits, teacher = ((random.normal(size=(2, 3, vocabulary)) * spread).astype(np.float32) for _ in "ab")
    targets = random.integers(0, vocabulary, (2, 3)).astype(np.int32)
    mask = (random.random((2, 3)) < 0.7).astype(np.float32)
    ids, logs = (np.array(one) for one in likeliest(mx.array(teacher), top, temperature))
    asked = logits, targets, mask, 5, how, ids, logs.astype(np.float16)
    by_row, gradient = ours(*asked)
    ce, kl, expected = in_float64(*asked)
    np.testing.assert_allclose(by_row[:, 0], ce, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(by_row[:, 1], kl, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=1e-6)


def test_a_teachers_values_are_its_softmax():
    """The likeliest tokens, in order, at a temperature, and all others as one; whole distributions are the limit."""
    random = np.random.default_rng(1)
    teacher = (random.normal(size=(2, 3, 40)) * 4).astype(np.float32)
    student = (random.normal(size=(2, 3, 40)) * 4).astype(np.float32)
    p, log_q = np.exp(log_softmax(teacher / 2.0)), log_softmax(student / 2.0)
    whole = (p * (np.log(p) - log_q)).sum(axis=-1).sum(axis=-1) / 6
    found = []
    for top in (1, 8, 39):
        ids, logs = (np.array(one) for one in likeliest(mx.array(teacher), top, 2.0))
        order = np.argsort(-teacher, axis=-1)
        assert np.array_equal(ids, order[..., :top])
        np.testing.assert_allclose(np.exp(logs[..., :-1]), np.take_along_axis(p, ids, -1), rtol=1e-5)
        rest = np.take_along_axis(p, order[..., top:], -1).sum(axis=-1)
        np.testing.assert_allclose(np.exp(logs[..., -1]), rest, rtol=1e-5)
        how, targets = Distillation(1.0, 2.0, top), np.zeros((2, 3), np.int32)
        given = targets, np.ones((2, 3), np.float32), 6, how, ids, logs
        found.append(ours(student, *given)[0][:, 1])
        itself, gradient = ours(teacher, *given)
        assert np.abs(itself[:, 1]).max() <= 1e-6  # nothing is left to learn of oneself
        assert np.abs(gradient).max() <= 1e-6
    assert (found[0] < found[1]).all()
    assert (found[1] < found[2]).all()
    np.testing.assert_allclose(found[2], whole, rtol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case(taught=True, tied=True, cells=2),
        Case(taught=True, family="qwen3", cells=1, tail=2, stage=0, packed=True),
        Case(taught=True, cells=3, tail=4, stage=2, compiled=True, run_ahead=True),
    ],
    ids=["recomputed", "tail, packed", "whole tail"],
)
def test_steps_have_the_whole_models_gradients(case):
    """MLX's own KL divergence and autodiff of the whole model, in the place of a head in chunks."""
    with CommThread() as thread:
        comm = SoloCommunicator("here")
        trainer, batches = trainer_of(case, comm, thread), batches_of(case)
        total = counted_tokens(batches)
        loss = trainer.compute(batches, total)
        found = gathered_gradients(trainer, comm)
        trainer.gradients.clear()
        told = trainer.train_step(batches, total, 1, 1e-3)
    expected_loss, expected = reference_gradients(case, 1)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in expected.items():
        assert np.abs(found[name] - gradient).max() <= 2e-5 * np.abs(gradient).max() + 1e-9, name
    assert TAUGHT.mixed(**told.parts) == told.loss == loss
    assert told.parts["divergence"] > 0.1
