"""Streamed steps with ternary weights against the textbook in float64, and their bits on any number of ranks."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from qat.textbook import Textbook, codes_and_means, used
from support.mpi import run_ranks
from support.stepping import batches_of, counted_tokens, whole_weights
from support.tiny_models import tiny_config
from support.tuning import TunedCase, tuned_trainer

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.errors import UserError
from mlx_empire.model import ternary

TERNARY = {"type": "full", "qat": "ternary"}
COMMON: dict[str, Any] = {
    "micro_batches": 3,
    "cells": 1,
    "learning_rate": 1e-4,
    "weight_decay": 0.1,
    "clip_norm": 0.5,
    "qat_warmup": 4,
}


@pytest.fixture
def thread():
    with CommThread() as one:
        yield one


def take(trainer, case, step):
    batches = batches_of(case, step)
    return trainer.train_step(
        batches, counted_tokens(batches), step + 1, case.learning_rate, case.strength(step)
    ).loss


@pytest.mark.parametrize(
    ("group", "compiled"),
    [
        (64, True),
        ("matrix", False),
        pytest.param(64, False, marks=pytest.mark.slow),
        pytest.param("matrix", True, marks=pytest.mark.slow),
    ],
)
def test_steps_are_the_textbooks(group, compiled, thread):
    """Six steps through the warm-up, two of them at full strength: losses, latent weights and learned scales."""
    case = TunedCase(tuning={**TERNARY, "qat_group": group}, tail=1, compiled=compiled, **COMMON)
    trainer, book = tuned_trainer(case, SoloCommunicator("here"), thread), Textbook(case)
    start = {name: w.copy() for name, w in book.weights.items()}
    assert whole_weights(trainer).keys() == start.keys()
    for step in range(6):
        assert take(trainer, case, step) == pytest.approx(book.step(step), rel=2e-5), step
    found = whole_weights(trainer)
    for name, should in book.weights.items():
        moved = np.linalg.norm(should - start[name])
        assert moved > 0, name
        assert np.linalg.norm(found[name].reshape(should.shape) - should) <= 0.02 * moved, name
    traces = trainer._passes.traces
    assert not traces.untraced
    assert not compiled or len(traces._known) == 2, "one forward and one backward, whatever the strength is"


def test_the_strength_is_heard(thread):
    """The reference can fail: at another strength the first loss is far from it."""
    case = TunedCase(tuning=TERNARY, **{**COMMON, "qat_warmup": 0})
    loss = take(tuned_trainer(case, SoloCommunicator("here"), thread), case, 0)
    plain = TunedCase(tuning=TERNARY, **COMMON)
    assert abs(loss - Textbook(plain).step(0)) > 1e-3
    assert loss == pytest.approx(Textbook(case).step(0), rel=2e-5)


def test_an_evaluation_is_of_ternary_weights_in_full(thread):
    case = TunedCase(tuning=TERNARY, **COMMON)
    trainer, book = tuned_trainer(case, SoloCommunicator("here"), thread), Textbook(case)
    trainer._passes.strength.at(0.25)
    batches = batches_of(case)
    total = counted_tokens(batches)
    full = TunedCase(tuning=TERNARY, **{**COMMON, "qat_warmup": 0})
    expected = Textbook(full).step(0)
    assert sum(trainer.streamed.losses(batches, total)) == pytest.approx(expected, rel=2e-5)
    assert trainer._passes.strength.value.item() == 0.25
    with trainer.whole_model() as model:
        one = model(mx.array(batches[0].inputs))
        book.model.load_weights([(n, mx.array(w.astype(np.float32))) for n, w in book.plain(1.0).items()])
        assert np.abs(np.array(one - book.model(mx.array(batches[0].inputs)))).max() < 1e-4


def test_what_is_used_at_the_ends_is_the_weight_and_its_rounding_to_the_bit():
    weight = mx.random.normal((8, 128), key=mx.random.key(3))
    offsets = 0.1 * mx.random.normal((8, 2), key=mx.random.key(4))
    for one in (weight, weight.astype(mx.bfloat16)):
        assert mx.array_equal(ternary.used(one, offsets, mx.array(0.0)), one)
        full = ternary.used(one, offsets, mx.array(1.0))
        assert mx.array_equal(full, ternary.rounded(one, offsets))
        values = np.array(full.astype(mx.float32)).reshape(-1, 64)
        assert all(len(np.unique(np.abs(group))) <= 2 for group in values)
    exact = used(np.array(weight).astype(np.float64), np.array(offsets), 64, 0.3)
    assert np.abs(np.array(ternary.used(weight, offsets, mx.array(0.3))) - exact).max() < 1e-6


def test_a_group_of_zeros_stays_zero_and_has_a_finite_gradient():
    weight, offsets = mx.zeros((2, 64)), mx.zeros((2, 1))
    gradients = mx.grad(lambda w, o: ternary.used(w, o, mx.array(1.0)).sum(), argnums=(0, 1))(weight, offsets)
    assert mx.array_equal(gradients[0], mx.ones((2, 64)))
    assert mx.array_equal(gradients[1], mx.zeros((2, 1)))


def test_two_layers_in_float64_with_every_derivative_written_out():
    """y = W2 relu(W1 x), squared error: MLX's gradients through the module against the chain rule by hand."""
    rng = np.random.default_rng(5)
    w1, w2, x = rng.normal(size=(128, 64)), rng.normal(size=(3, 128)), rng.normal(size=(9, 64))
    o1, o2, y, strength = (
        rng.normal(size=(128, 1)) / 9,
        rng.normal(size=(3, 2)) / 9,
        rng.normal(size=(9, 3)),
        0.7,
    )

    def loss(a, b, p, q):
        hidden = mx.maximum(mx.array(x, mx.float32) @ ternary.used(a, p, mx.array(strength)).T, 0)
        error = hidden @ ternary.used(b, q, mx.array(strength)).T - mx.array(y, mx.float32)
        return (error * error).sum()

    given = [mx.array(v.astype(np.float32)) for v in (w1, w2, o1, o2)]
    found = mx.grad(loss, argnums=(0, 1, 2, 3))(*given)
    u1, u2 = used(w1, o1, 64, strength), used(w2, o2, 64, strength)
    before = x @ u1.T
    error = 2 * (np.maximum(before, 0) @ u2.T - y)
    d2 = error.T @ np.maximum(before, 0)
    d1 = ((error @ u2) * (before > 0)).T @ x
    scales = []
    for w, d in ((w1, d1), (w2, d2)):
        codes, means = codes_and_means(w, 64)
        scales.append(strength * (d.reshape(codes.shape) * codes * means).sum(-1))
    for got, should in zip(found, (d1, d2, *scales), strict=True):
        assert np.abs(np.array(got) - should).max() <= 2e-5 * np.abs(should).max()


def test_a_mixture_is_refused(thread):
    with pytest.raises(UserError, match=r"tuning\.qat: ternary: qwen3_moe is a mixture"):
        tuned_trainer(TunedCase("qwen3_moe", tuning=TERNARY, **COMMON), SoloCommunicator("here"), thread)


def test_a_model_without_a_whole_group_is_refused(thread):
    small = {"hidden_size": 48, "intermediate_size": 80, "head_dim": 12, "num_attention_heads": 4}
    assert tiny_config("llama", **small)["hidden_size"] == 48
    with pytest.raises(UserError, match="has a multiple of 64 inputs"):
        tuned_trainer(TunedCase(tuning=TERNARY, config=small, **COMMON), SoloCommunicator("here"), thread)


CASES = {
    "group, stage 3": {"stage": 3, "compiled": True},
    "group, stage 2": {"stage": 2, "compiled": False, "tail": 2},
    "matrix, bfloat16, stage 3": {
        "stage": 3,
        "dtype": "bfloat16",
        "tuning": {**TERNARY, "qat_group": "matrix"},
    },
    "matrix, bfloat16, stage 0": {
        "stage": 0,
        "dtype": "bfloat16",
        "tuning": {**TERNARY, "qat_group": "matrix"},
    },
}


@cache
def reports(ranks: int) -> list[dict[str, Any]]:
    common = {**COMMON, "shares": [2, 1, 3], "cells": 3, "micro_batches": 3, "steps": 3, "qat_warmup": 2}
    cases = {name: {"tuning": TERNARY, **common, **one} for name, one in CASES.items()}
    return run_ranks(ranks, "tests/adapters/worker.py", [json.dumps(cases)])


@pytest.mark.parametrize("kind", ["group", "matrix"])
def test_one_two_and_three_ranks_have_the_same_bits(kind):
    found = [
        {key: case[key] for key in ("losses", "norms", "weights")}
        for ranks in (1, 2, 3)
        for one in reports(ranks)
        for name, case in one.items()
        if name.startswith(kind)
    ]
    assert len(found) == 12
    assert all(one == found[0] for one in found)
    for ranks in (2, 3):
        assert all(case["moved"] == case["planned"] for one in reports(ranks) for case in one.values())
