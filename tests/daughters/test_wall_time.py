"""When a daughter is saved and evaluated: by wall time on one machine's clock, by steps, and before it pauses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from run.test_job import job

from mlx_empire.daughters.daughter import Daughter

GATE: Any = SimpleNamespace(reached=False)
REST: Any = SimpleNamespace()


def daughter(*overrides: str, step: int, saved: int = 0) -> Daughter:
    asked = job("run.steps=20", *overrides)
    return Daughter(
        "anna", REST, REST, REST, asked, None, GATE, REST, step, saved, saved_at=100.0, evaluated_at=100.0
    )


@pytest.mark.parametrize(("step", "now", "due"), [(3, 159.0, False), (3, 160.0, True), (20, 101.0, True)])
def test_by_wall_time_the_clock_decides_and_the_last_step(step: int, now: float, due: bool) -> None:
    one = daughter("run.save_every=1min", "run.eval_every=60s", step=step)
    assert (one.to_be_saved(now), one.to_be_scored(now)) == (due, due)


@pytest.mark.parametrize(("step", "saved", "due"), [(6, 4, False), (7, 4, True), (20, 19, True)])
def test_by_steps_it_is_what_would_be_lost(step: int, saved: int, due: bool) -> None:
    assert daughter("run.save_every=3", step=step, saved=saved).to_be_saved(1e9) == due


@pytest.mark.parametrize(("step", "scored", "only"), [(3, True, False), (4, True, True), (5, True, True)])
def test_an_evaluation_before_a_pause_is_one_of_its_own_only_where_it_is_due(
    step: int, scored: bool, only: bool
) -> None:
    one = daughter("run.eval_every=3", step=step)
    one.pause = step
    assert (one.to_be_scored(100.0), one.only_compared(100.0)) == (scored, only)
    one.pause = step + 1
    assert (one.to_be_scored(100.0), one.only_compared(100.0)) == (not only, False)


def test_without_a_duration_nothing_is_saved() -> None:
    assert not daughter(step=20).to_be_saved(1e9)
