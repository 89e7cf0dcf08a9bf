"""Gradient release: without clipping the same bits as with kept gradients, with it the rule of the docstring."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from optim.reference import adamw
from support.references import reference_gradients
from support.stepping import (
    Case,
    batches_of,
    counted_tokens,
    digest,
    own_batches,
    trainer_of,
    weights_of,
    whole_weights,
)

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.trainer import StepResult, Trainer
from mlx_empire.errors import NumericsError

CASE = Case(micro_batches=4, cells=2, tied=True, learning_rate=1e-3, release=True, clip_norm=0.5)


@pytest.fixture
def thread():
    with CommThread() as one:
        yield one


def made(case: Case, thread: CommThread) -> Trainer:
    return trainer_of(case, SoloCommunicator("here"), thread)


def take(trainer: Trainer, case: Case, step: int) -> StepResult:
    batches = batches_of(case, step)
    return trainer.train_step(
        own_batches(trainer, batches, 0), counted_tokens(batches), step, case.learning_rate
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tail": 4, "dtype": "bfloat16", "gradient_dtype": "bfloat16", "state_bits": 8},
        {"family": "gemma2", "tied": False, "tail": 2},
    ],
    ids=["plain", "bfloat16", "gemma2"],
)
def test_without_clipping_nothing_changes_but_the_order(stage, settings, thread):
    case = replace(CASE, clip_norm=None, stage=stage, **settings)
    ends = []
    for release in (True, False):
        trainer = made(replace(case, release=release), thread)
        losses = [take(trainer, case, step).loss for step in (1, 2, 3)]
        ends.append((losses, digest(whole_weights(trainer))))
    assert ends[0] == ends[1]


def test_no_gradient_is_kept(thread):
    trainer = made(CASE, thread)
    seen: list[int] = []
    updater = trainer._updater
    whole = updater.update

    def update(index: int) -> None:
        whole(index)
        seen.append(index)
        assert index not in trainer.gradients.totals

    updater.update = update
    take(trainer, CASE, 1)
    assert seen == [4, 3, 2, 1, 0]


def test_clipping_follows_the_rule_of_the_docstring(thread):
    """Against AdamW in float64 on whole-model gradients, unit by unit in the backward's order."""
    trainer = made(CASE, thread)
    _, spec, values = weights_of(CASE)
    weights = {name: np.array(a).reshape(-1).astype(np.float64) for name, a in values.items()}
    shapes = {name: a.shape for name, a in values.items()}
    states = {name: (np.zeros_like(w), np.zeros_like(w)) for name, w in weights.items()}
    last, scales = 0.0, set()
    for step in (1, 2, 3, 4):
        result = take(trainer, CASE, step)
        now = {name: mx.array(w.astype(np.float32)).reshape(shapes[name]) for name, w in weights.items()}
        _, gradients = reference_gradients(CASE, 1, now, step)
        squares = 0.0
        for unit in [*reversed(spec.units[1:]), spec.units[0]]:
            squares += sum(float((gradients[t.name].astype(np.float64) ** 2).sum()) for t in unit.tensors)
            scale = min(1.0, CASE.clip_norm / max(last, np.sqrt(squares)))
            scales.add(round(scale, 6))
            for t in unit.tensors:
                g = scale * gradients[t.name].astype(np.float64)
                weights[t.name], *states[t.name] = adamw(
                    weights[t.name], *states[t.name], g, step, CASE.learning_rate
                )
        last = np.sqrt(squares)
        assert result.gradient_norm == pytest.approx(last, rel=1e-5)
    assert len(scales) > 4  # the rule was at work
    start = {name: np.array(a).reshape(-1).astype(np.float64) for name, a in values.items()}
    for name, found in whole_weights(trainer).items():
        moved, should = found - start[name], weights[name] - start[name]
        assert np.linalg.norm(moved - should) / np.linalg.norm(should) < 0.01, name


def test_what_is_carried_continues_bitwise(thread):
    straight, broken = made(CASE, thread), made(CASE, thread)
    for step in (1, 2):
        take(straight, CASE, step)
        take(broken, CASE, step)
    carried = broken.carried()
    assert carried["last_norm"][0] > CASE.clip_norm
    broken._updater.last_norm = 0.0
    broken.carry_on(carried)
    for trainer in (straight, broken):
        take(trainer, CASE, 3)
    assert digest(whole_weights(straight)) == digest(whole_weights(broken))


@pytest.mark.parametrize(
    ("unit", "says"),
    [(4, "no weight was changed"), (2, "2 of 5 units were updated already .*checkpoint")],
)
def test_a_gradient_that_is_not_finite_stops_before_its_own_unit(unit, says, thread):
    trainer = made(CASE, thread)
    whole = trainer._updater.norm_of

    def poison(index: int) -> None:
        if index == unit:
            total = trainer.gradients.totals[index]
            total[0] = mx.where(mx.arange(total[0].size).reshape(total[0].shape) == 70, mx.nan, total[0])
        whole(index)

    trainer._updater.norm_of = poison
    before = {
        unit.index: [np.array(c.weights) for s in trainer.store.chunks[unit.index] for c in s]
        for unit in trainer.store.plan.units
    }
    with pytest.raises(
        NumericsError, match=rf"step 1: the gradient of model.layers.{unit - 1}\..* is not finite; {says}"
    ):
        take(trainer, CASE, 1)
    changed = [
        index
        for index, arrays in before.items()
        if any(
            not np.array_equal(a, np.array(c.weights))
            for a, c in zip(arrays, (c for s in trainer.store.chunks[index] for c in s), strict=True)
        )
    ]
    assert changed == list(range(unit + 1, 5))


def test_a_loss_that_is_not_finite_changes_nothing(thread):
    trainer = made(CASE, thread)
    chunk = trainer.store.chunks[0][0][0]
    trainer.store._whole.clear()
    chunk.weights = chunk.weights * mx.nan
    with pytest.raises(NumericsError, match="not finite; no weight was changed"):
        take(trainer, CASE, 1)
