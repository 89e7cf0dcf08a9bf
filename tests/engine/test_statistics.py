"""Statistics of optimizer states against the reference's moments, and that they notice what they are there for."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from optim import reference
from support.stepping import Case, batches_of, counted_tokens, own_batches, trainer_of

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.trainer import StepResult, Trainer
from mlx_empire.optim.adamw import AdamW
from mlx_empire.optim.protocol import ChunkId, StepScalars

CASE = Case(micro_batches=2, cells=1, learning_rate=1e-3, state_bits=8)


@pytest.fixture
def trainer():
    with CommThread() as thread:
        yield trainer_of(CASE, SoloCommunicator("here"), thread, statistics_every=3)


def take(trainer: Trainer, step: int, rows_of: int | None = None) -> StepResult:
    batches = batches_of(CASE, step if rows_of is None else rows_of)
    return trainer.train_step(
        own_batches(trainer, batches, 0), counted_tokens(batches), step, CASE.learning_rate
    )


def test_they_come_every_third_step_and_are_sound(trainer):
    found = [take(trainer, step).statistics for step in range(1, 7)]
    assert [bool(one) for one in found] == [False, False, True, False, False, True]
    for one in (found[2], found[5]):
        assert set(one) - {"gradient_noise"} == {"update_over_lr_max", "v_at_floor", "v_zero", "v_bias"}
        assert 0.5 < one["update_over_lr_max"] < 3
        assert 1 / 64 * 0.3 < one["v_at_floor"] < 0.2
        assert abs(one["v_bias"]) < 0.03


def test_largest_update_is_the_references(trainer):
    steps = [take(trainer, step) for step in (1, 2, 3)]
    worst = 0.0
    for unit in trainer.store.chunks:
        for chunk in (c for segment in unit for c in segment):
            state = {
                n: np.array(a.astype(mx.float32) if a.dtype == mx.bfloat16 else a)
                for n, a in chunk.state.items()
            }
            if "m" in state:
                m, v = state["m"].astype(np.float64), state["v"].astype(np.float64)
            else:
                m = reference.decode_first(state["m_codes"], state["m_scale"].astype(np.float64))
                floor, levels = (state[name].astype(np.int64) for name in ("v_floor", "v_levels"))
                v = reference.decode_second(state["v_codes"], floor, levels)
            worst = max(worst, np.abs(m / (1 - 0.9**3) / (np.sqrt(v / (1 - 0.999**3)) + 1e-8)).max())
    assert steps[-1].statistics["update_over_lr_max"] == pytest.approx(worst, rel=1e-5)


def test_a_lost_second_moment_is_seen(trainer):
    for step in (1, 2):
        take(trainer, step)
    for unit in trainer.store.chunks:
        for chunk in (c for segment in unit for c in segment if "v_codes" in c.state):
            chunk.state["v_codes"] = mx.zeros_like(chunk.state["v_codes"])  # as if rounded to zero
    found = take(trainer, 3).statistics
    assert found["v_bias"] < -0.1


@pytest.mark.parametrize("settings", [{"optimizer": "lion"}, {"optimizer": "sgd"}, {"state_bits": 32}])
def test_other_optimizers_say_what_they_have(settings):
    case = replace(CASE, **settings)
    noise = [] if "optimizer" in settings else ["gradient_noise"]
    with CommThread() as thread:
        made = trainer_of(case, SoloCommunicator("here"), thread, statistics_every=1)
        assert list(take(made, 1).statistics) == ["update_over_lr_max"]  # one gradient has no variance
        again = take(made, 2, rows_of=1).statistics  # the same rows, so that a mean stands out
        assert list(again) == ["update_over_lr_max", *noise]


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(("beta2", "steps"), [(0.999, 40), (0.95, 120)])
@pytest.mark.parametrize("noise", [0.5, 4.0, 50.0])
def test_the_gradients_noise_is_what_was_put_in(noise, beta2, steps, bits):
    """Gradients with a known mean, and a known variance around it: both as they are drawn, and by AdamW's moments."""
    random = np.random.default_rng(1)
    mean = random.normal(size=(512, 64)) * np.exp(random.normal(size=(512, 1)))
    deviation = np.sqrt(noise * np.mean(mean**2))
    rule = AdamW((0.9, beta2), state_bits=bits)
    weights = mx.zeros((512, 64))
    state = rule.init(weights, quantised=True)
    for step in range(1, steps + 1):
        gradient = mx.array((mean + deviation * random.normal(size=mean.shape)).astype(np.float32))
        weights, state = rule.update(weights, state, gradient, ChunkId(1, 0, False), StepScalars(step, 1e-3))
    powers = [float(one.item()) for one in rule.powers(state, steps)]
    assert rule.noise_over_signal(*powers, steps) == pytest.approx(noise, rel=0.1)


def test_gradients_without_a_mean_have_no_ratio():
    rule = AdamW()
    assert rule.noise_over_signal(1.0, 2.0, 1) is None  # one step
    assert rule.noise_over_signal(0.05, 1.0, 1000) is None  # m is what noise alone leaves of it
