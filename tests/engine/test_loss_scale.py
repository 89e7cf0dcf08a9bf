"""Mixed precision in float16: what scaling brings back, what an overflow leaves alone, and the rule of the scale.

References: the whole model's gradients in float32, a run that never saw the steps that were left out, and the rule of
Micikevicius et al. written down once more (`tests/interop/test_grad_scaler.py` asks torch itself).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.references import reference_gradients
from support.stepping import (
    Case,
    batches_of,
    counted_tokens,
    digest,
    gathered_gradients,
    own_batches,
    trainer_of,
    whole_weights,
)

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.loss_scale import FIRST, LEAST, LossScale
from mlx_empire.engine.trainer import StepResult, Trainer
from mlx_empire.errors import NumericsError

HALF = Case(dtype="float16", tied=True, steps=4, learning_rate=1e-3)
COMM = SoloCommunicator("here")
PART = 2**12  # of a step's tokens these are one in so many, as one micro-batch of a large step has it


def scaled_gradients(scale: float) -> tuple[float, dict[str, np.ndarray]]:
    """Loss, and gradients with the scale taken out in float64."""
    case = replace(HALF, loss_scale=scale)
    with CommThread() as thread:
        trainer, batches = trainer_of(case, COMM, thread), batches_of(case)
        loss = trainer.compute(own_batches(trainer, batches, 0), PART * counted_tokens(batches))
        found = gathered_gradients(trainer, COMM)
    return loss, {name: values.astype(np.float64) / scale for name, values in found.items()}


def test_scaled_gradients_are_those_of_float32_and_small_ones_survive():
    true_loss, true = reference_gradients(replace(HALF, dtype="float32"), 1)
    loss, found = scaled_gradients(FIRST)
    true = {name: values.astype(np.float64) / PART for name, values in true.items()}
    assert loss == pytest.approx(true_loss / PART, rel=1e-3)
    unscaled = scaled_gradients(1.0)[1]
    lost = dict.fromkeys(("scaled", "unscaled"), 0)
    for name, values in true.items():
        error = np.linalg.norm(found[name] - values) / np.linalg.norm(values)
        assert error <= 5e-3, (name, error)  # float16 has 11 bits
        there = np.abs(values) > 1e-10
        lost["scaled"] += int((there & (found[name] == 0)).sum())
        lost["unscaled"] += int((there & (unscaled[name] == 0)).sum())
    assert lost["unscaled"] > 1000
    assert 100 * lost["scaled"] < lost["unscaled"]


def steps(trainer: Trainer, numbers: Iterable[int]) -> list[StepResult]:
    """Steps with these numbers, all on the same batches."""
    batches = batches_of(HALF)
    own, total = own_batches(trainer, batches, 0), counted_tokens(batches)
    return [trainer.train_step(own, total, step, 1e-4) for step in numbers]


@pytest.mark.parametrize("state_bits", [32, 8])
def test_a_step_that_overflows_changes_nothing_and_does_not_count(state_bits):
    config = {"hidden_size": 128, "intermediate_size": 256} if state_bits == 8 else {}
    case = replace(HALF, state_bits=state_bits, config=config)
    with CommThread() as thread:
        trainer = trainer_of(replace(case, loss_scale=2.0**24, scale_window=1000), COMM, thread)
        before = digest(whole_weights(trainer))
        (first,) = steps(trainer, [1])
        assert (first.skipped, first.gradient_norm) == (True, float("inf"))
        assert first.note == (
            "gradients overflowed in float16: this step's update is left out, loss scale 16777216 -> 8388608"
        )
        assert digest(whole_weights(trainer)) == before
        skipped = 1
        while steps(trainer, [skipped + 1])[0].skipped:
            skipped += 1
        steps(trainer, range(skipped + 2, skipped + 4))
        carried, weights = trainer.carried()["loss_scale"], digest(whole_weights(trainer))
        assert carried == [2.0 ** (24 - skipped), 3, skipped]
        undisturbed = trainer_of(replace(case, loss_scale=2.0 ** (24 - skipped)), COMM, thread)
        steps(undisturbed, range(1, 4))
        assert digest(whole_weights(undisturbed)) == weights
        assert "loss_scale" not in undisturbed.carried()


def test_what_no_scale_mends_is_an_error_that_names_it():
    with CommThread() as thread:
        trainer = trainer_of(replace(HALF, loss_scale=2.0, scale_window=5), COMM, thread)
        unit = trainer.store.plan.units[1]
        name = unit.segments[0].placements[0].tensor.name
        trainer.store.chunks[1][0][0].weights[:] = float("nan")
        assert steps(trainer, [1])[0].skipped  # it may have been the scale
        with pytest.raises(NumericsError, match=f"step 2: the loss is nan.*{name}"):
            steps(trainer, [2])


def textbook(overflows: list[bool], first: float, window: int) -> list[float]:
    """The scale before each step and after the last."""
    scale, clean, found = first, 0, [first]
    for overflow in overflows:
        clean = 0 if overflow else clean + 1
        if overflow:
            scale *= 0.5
        elif clean == window:
            scale, clean = scale * 2.0, 0
        found.append(scale)
    return found


@given(st.lists(st.booleans(), max_size=12), st.integers(1, 5))
def test_the_scale_halves_at_an_overflow_and_doubles_after_a_window_without(overflows, window):
    scale = LossScale(2.0**13, window)
    found = [scale.value]
    for overflow in overflows:
        if overflow and not scale.may_fall:
            assert scale.value == LEAST
            break
        if overflow:
            scale.overflowed()
        else:
            scale.held()
        found.append(scale.value)
        resumed = LossScale(1.0, window)
        resumed.carry_on(scale.carried())
        assert resumed == scale
    assert found == [min(value, 2.0**24) for value in textbook(overflows, 2.0**13, window)][: len(found)]
