"""Ten streamed steps with adapters against mlx-lm's own layers trained as a whole, in one process."""

import mlx.core as mx
import numpy as np
import pytest
from support.references import our_losses, stock_losses
from support.stepping import batches_of, counted_tokens, whole_weights
from support.tuning import (
    LINEAR,
    TunedCase,
    reference_model,
    seeded,
    textbook_steps,
    trainable,
    tuned_trainer,
)

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread

FAMILIES = ("llama", "qwen3_moe", "llama4")
TUNINGS = {
    "lora": {"type": "lora", "rank": 4},
    "dora": {"type": "dora", "rank": 4, "alpha": 4},
    "qlora": {"type": "qlora", "rank": 4},
}
COMMON = {"micro_batches": 3, "cells": 1, "learning_rate": 1e-3, "weight_decay": 0.1, "clip_norm": 0.05}


@pytest.fixture
def thread():
    with CommThread() as one:
        yield one


@pytest.fixture
def comm():
    return SoloCommunicator("here")


def steps(trainer, case, count):
    losses = []
    for step in range(count):
        batches = batches_of(case, step)
        result = trainer.train_step(batches, counted_tokens(batches), step + 1, case.learning_rate)
        losses.append(result.loss)
    return losses


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_are_those_of_mlx_lms_own_layers(family, tuning, comm, thread):
    # AdamW divides by a root: one of DoRA's gradients here is so near zero that it shows how the loss was rounded.
    by_row = our_losses if (family, tuning["type"]) == ("qwen3_moe", "dora") else stock_losses
    compare(TunedCase(family, tuning=tuning, tail=1, **COMMON), comm, thread, by_row)


@pytest.mark.parametrize(
    "bits", ["ternary", "mxfp4", *(pytest.param(bits, marks=pytest.mark.slow) for bits in ("mxfp8", "nvfp4"))]
)
def test_so_they_are_on_other_packed_bases(bits, comm, thread):
    """The ternary one against a dense model with weights that numpy made ternary."""
    tuning = {"type": "qlora", "rank": 4, "bits": bits}
    compare(TunedCase("llama", tuning=tuning, tail=1, **COMMON), comm, thread)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_so_they_are_with_adapters_on_embedding_and_head(kind, tied, comm, thread):
    names = ["embed_tokens", *([] if tied else ["lm_head"])]
    tuning = {"type": kind, "rank": 4, "targets": ["all-linear", *names], "dropout": 0.0}
    compare(TunedCase("llama", tied=tied, tuning=tuning, tail=1, **COMMON), comm, thread)


def test_so_they_are_with_dora_on_the_head(comm, thread):
    compare(TunedCase("llama", tuning={"type": "dora", "targets": ["lm_head"]}, **COMMON), comm, thread)


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4"])
@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_so_they_are_with_adapters_on_the_experts(family, kind, comm, thread):
    tuning = {"type": kind, "rank": 2, "targets": [*LINEAR[family], "experts"]}
    compare(TunedCase(family, tuning=tuning, **COMMON), comm, thread)


def test_so_they_are_with_adapters_in_the_last_layers_only(comm, thread):
    compare(TunedCase("llama", tuning={"type": "lora", "layers": 2}, tail=3, **COMMON), comm, thread)


def compare(case, comm, thread, by_row=stock_losses):
    trainer = tuned_trainer(case, comm, thread)
    first = whole_weights(trainer)
    model = reference_model(case)
    model.load_weights(
        [(n, mx.array(first[n]).reshape(w.shape)) for n, w in trainable(model).items()], strict=False
    )
    start = trainable(model)
    expected_losses = textbook_steps(case, model, 10, by_row)
    assert steps(trainer, case, 10) == pytest.approx(expected_losses, rel=1e-5)
    found, expected = whole_weights(trainer), trainable(model)
    for name, should in expected.items():
        got = found[name].reshape(should.shape)
        assert np.abs(got - should).max() <= 1e-5 * max(np.abs(should).max(), 1), name
        moved = should - start[name]
        assert np.linalg.norm(moved) > 0, name
        assert np.linalg.norm(got - should) <= 0.01 * np.linalg.norm(moved), name
    for name, before in first.items():
        if name not in expected:
            assert np.array_equal(found[name], before), f"{name} is frozen"


def test_dropout_is_the_same_in_the_recomputation(comm, thread):
    """Against the whole model, which runs each layer once: with masks of each step, micro-batch and layer."""
    tuning = {"type": "lora", "rank": 4, "dropout": 0.3}
    losses = {}
    for tail in (0, 2):
        case = TunedCase("llama", tuning=tuning, tail=tail, **COMMON)
        trainer = tuned_trainer(case, comm, thread)
        first = whole_weights(trainer)
        losses[tail] = steps(trainer, case, 4)
    model = reference_model(case)
    model.load_weights(
        [(n, mx.array(first[n]).reshape(w.shape)) for n, w in trainable(model).items()], strict=False
    )
    expected = textbook_steps(case, seeded(model), 4)
    assert losses[0] == losses[2] == pytest.approx(expected, rel=1e-6)
    found = whole_weights(trainer)
    for name, should in trainable(model).items():
        got = found[name.replace(".layer.", ".")].reshape(should.shape)
        assert np.abs(got - should).max() <= 1e-5 * max(np.abs(should).max(), 1), name


def test_evaluation_has_no_dropout(comm, thread):
    case = TunedCase("llama", tuning={"type": "lora", "dropout": 0.5}, **COMMON)
    trainer = tuned_trainer(case, comm, thread)
    steps(trainer, case, 1)  # while lora_b is zero dropout does nothing
    batches = batches_of(case)
    once = trainer.streamed.losses(batches, 100)
    mx.random.seed(99)
    assert trainer.streamed.losses(batches, 100) == once
    assert trainer.compute(batches, 100, 2) != sum(once)
