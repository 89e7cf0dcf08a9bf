"""Steps in one process against textbook references: AdamW in float64, chunked losses, non-finite numbers."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from support.references import reference_gradients
from support.stepping import (
    Case,
    as_fp32,
    batches_of,
    counted_tokens,
    gathered_gradients,
    own_batches,
    rounded_to_bf16,
    trainer_of,
    weights_of,
    whole_weights,
)
from support.tiny_models import FAMILIES

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.data.batches import MicroBatch
from mlx_empire.engine.numerics import SpikeWatch
from mlx_empire.errors import NumericsError


@pytest.fixture
def thread():
    with CommThread() as one:
        yield one


@pytest.fixture
def comm():
    return SoloCommunicator("here")


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_are_those_of_a_textbook_adamw(family, comm, thread):
    case = Case(family, micro_batches=3, cells=1, learning_rate=1e-5, weight_decay=0.1, clip_norm=0.5)
    trainer = trainer_of(case, comm, thread)
    start = {name: np.array(a).reshape(-1).astype(np.float64) for name, a in weights_of(case)[2].items()}
    shapes = {name: a.shape for name, a in weights_of(case)[2].items()}
    expected = _textbook_adamw(case, start, shapes, steps=10)
    for step in range(10):
        batches = batches_of(case, step)
        own = own_batches(trainer, batches, 0)
        trainer.train_step(own, counted_tokens(batches), step + 1, case.learning_rate)
    for name, found in whole_weights(trainer).items():
        scale = max(np.abs(expected[name]).max(), 0.01)  # some routers start at zero
        assert np.abs(found - expected[name]).max() / scale <= 1e-5, name
        moved, should = found - start[name], expected[name] - start[name]
        if len(shapes[name]) > 1 and np.abs(should).max() > 1e-7:
            assert np.linalg.norm(moved - should) / np.linalg.norm(should) < 0.01, name


def _textbook_adamw(
    case: Case, start: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]], steps: int
) -> dict[str, np.ndarray]:
    """Loshchilov and Hutter's algorithm in float64 on whole-model gradients, clipped by the global norm."""
    weights = {name: w.copy() for name, w in start.items()}
    m = {name: np.zeros_like(w) for name, w in weights.items()}
    v = {name: np.zeros_like(w) for name, w in weights.items()}
    for step in range(steps):
        values = {name: mx.array(w.astype(np.float32)).reshape(shapes[name]) for name, w in weights.items()}
        _, gradients = reference_gradients(case, 1, values, step)
        norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values()))
        clip = min(1.0, case.clip_norm / norm) if case.clip_norm else 1.0
        for name, gradient in gradients.items():
            g = gradient.astype(np.float64) * clip
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            corrected = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.999 ** (step + 1))
            decay = case.weight_decay if len(shapes[name]) > 1 else 0.0
            weights[name] -= case.learning_rate * (
                corrected[0] / (np.sqrt(corrected[1]) + 1e-8) + decay * weights[name]
            )
    return weights


@pytest.mark.parametrize("tail", [0, 2])
def test_logits_in_chunks_give_the_same_gradients(tail, comm, thread, monkeypatch):
    monkeypatch.setattr("mlx_empire.engine.trainer.chunk_tokens", lambda vocabulary, frozen: 20)
    case = Case("gemma2", micro_batches=2, cells=1, width=48, rows=2, tail=tail)
    trainer = trainer_of(case, comm, thread)
    widths: list[int] = []
    head = trainer._slotted.head

    def noting(tokens, boundary):
        widths.append(boundary.shape[1])
        return head(tokens, boundary)

    trainer._slotted.head = noting
    batches = batches_of(case)
    loss = trainer.compute(batches, counted_tokens(batches))
    assert max(widths) == 10
    assert sum(widths) == 2 * 48
    expected_loss, expected = reference_gradients(case, 1)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in gathered_gradients(trainer, comm).items():
        assert np.abs(gradient - expected[name]).max() <= 1e-5 * np.abs(expected[name]).max(), name


def test_losses_without_gradients_are_the_same(comm, thread):
    case = Case("qwen3", micro_batches=3, cells=1)
    trainer = trainer_of(case, comm, thread)
    batches = batches_of(case)
    total = counted_tokens(batches)
    forward = trainer.streamed.losses(batches, total)
    assert sum(forward) == trainer.compute(batches, total)


def test_bfloat16_with_exact_master_is_bit_for_bit_an_fp32_master_with_a_bf16_copy(comm, thread):
    """The reference keeps fp32 masters in numpy and rounds a bf16 copy (ties away) for each step's gradients."""
    case = Case(
        "llama", dtype="bfloat16", micro_batches=2, cells=1, learning_rate=1e-4, clip_norm=None, stage=3
    )
    trainer = trainer_of(case, comm, thread)
    plan = trainer.store.plan
    masters: dict[str, np.ndarray] = {}
    for name, (_, _, p) in plan.tensors.items():
        exact = np.array(weights_of(case)[2][name]).reshape(-1)
        masters[name] = (
            exact if p.tensor.kind == "small" else as_fp32(rounded_to_bf16(exact, ties_to_even=True))
        )
    m = {name: np.zeros_like(w) for name, w in masters.items()}
    v = {name: np.zeros_like(w) for name, w in masters.items()}
    f32 = np.float32
    for step in (1, 2, 3):
        batches = batches_of(case, step)
        trainer.compute(batches, counted_tokens(batches))
        gradients = gathered_gradients(trainer, comm)
        scalars = trainer._updater.clipped(step, case.learning_rate, trainer._updater.norm())
        trainer.renew(lambda name, scalars=scalars: scalars)
        rate = f32(case.learning_rate / (1 - 0.9**step))
        correction = f32(1 / (1 - 0.999**step))
        for name, g in gradients.items():
            m[name] = f32(0.9) * m[name] + f32(1 - 0.9) * g
            v[name] = f32(0.999) * v[name] + f32(1 - 0.999) * (g * g)
            update = rate * m[name] / (np.sqrt(v[name] * correction) + f32(1e-8))
            masters[name] = masters[name] - (update + f32(0.0) * masters[name])
        for name, found in whole_weights(trainer).items():
            ties_even = plan.tensors[name][2].tensor.kind == "small"
            np.testing.assert_array_equal(
                found, rounded_to_bf16(masters[name], ties_even), err_msg=f"{name}, step {step}"
            )


@pytest.mark.parametrize("stage", [0, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(stage, comm, thread):
    case = Case("llama", micro_batches=2, cells=1, stage=stage)
    trainer = trainer_of(case, comm, thread)
    before = whole_weights(trainer)
    batches = batches_of(case)
    trainer.compute(batches, counted_tokens(batches))
    poisoned = trainer.gradients.totals[2][0]
    trainer.gradients.totals[2][0] = mx.where(mx.arange(64) == 3, mx.array(mx.nan), poisoned)
    with pytest.raises(NumericsError, match=r"layers\.1"):
        trainer._updater.norm()
    after = whole_weights(trainer)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_loss_that_is_not_finite_names_the_rank(comm, thread):
    case = Case("llama", micro_batches=1, cells=1)
    trainer = trainer_of(case, comm, thread)
    (batch,) = batches_of(case)
    bad = MicroBatch(batch.inputs, batch.targets, np.full_like(batch.mask, np.inf), None, batch.rows_read)
    with pytest.raises(NumericsError, match="rank 0"):
        trainer.compute([bad], 10)


def test_a_frequent_token_s_gradient_is_not_swallowed_by_bfloat16(comm, thread):
    """The same token at 512 positions: its row is a sum of 512 numbers, off by a fifth if added in bfloat16."""
    case = Case("llama", dtype="bfloat16", micro_batches=1, rows=1, width=512, cells=1)
    inputs = np.full((1, 512), 5, np.int32)
    targets = np.full((1, 512), 9, np.int32)
    batch = MicroBatch(inputs, targets, np.ones((1, 512), np.float32), None, (0,))
    rows = {}
    for dtype in ("bfloat16", "float32"):
        trainer = trainer_of(replace(case, dtype=dtype), comm, thread)
        trainer.compute([batch], 512)
        gradient = gathered_gradients(trainer, comm)["model.embed_tokens.weight"]
        rows[dtype] = gradient.reshape(-1, trainer.spec.text_config["hidden_size"])[5]
    error = np.linalg.norm(rows["bfloat16"] - rows["float32"]) / np.linalg.norm(rows["float32"])
    assert error < 0.03


def test_a_skipped_step_changes_nothing(comm, thread):
    case = Case("llama", micro_batches=2, cells=1)
    spikes = SpikeWatch("skip", losses=[1e-3] * 20, norms=[1e3] * 20)
    trainer = trainer_of(case, comm, thread, spikes=spikes)
    before = whole_weights(trainer)
    states = states_of(trainer)
    batches = batches_of(case)
    result = trainer.train_step(batches, counted_tokens(batches), 1, 1e-3)
    assert result.skipped
    assert "loss" in result.note
    after = whole_weights(trainer)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert all(np.array_equal(a, b) for a, b in zip(states, states_of(trainer), strict=True))
    spikes.threshold = 1e9
    assert not trainer.train_step(batches, counted_tokens(batches), 2, 1e-3).skipped
    assert not all(np.array_equal(before[name], value) for name, value in whole_weights(trainer).items())


def states_of(trainer):
    return [np.array(a) for c in trainer.store.chunks[1][0] for a in c.state.values()]
