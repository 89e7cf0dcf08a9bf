"""Lengths of a run in steps, counted here row by row, and when something is due, against a walk through the steps."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.planning import recipe_of

from mlx_empire.plan.lengths import DataSize, Every, Lengths


@pytest.mark.parametrize(
    ("written", "size", "steps"),
    [
        ("100", None, 100),
        ("1Mtok", None, 62),  # 8 rows of 2,048 positions a step, each taken as a target
        ("1Mtok", DataSize(80, 80 * 512), 245),  # a quarter of them count
        ("2ep", DataSize(80, 1), 20),
        ("2ep", None, 1000),
    ],
)
def test_the_length_of_a_run(written: str, size: DataSize | None, steps: int) -> None:
    recipe = recipe_of(f"run.steps={written}")
    assert Lengths.of(recipe, size or DataSize.assumed(recipe)).steps == steps


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 10**5))
@settings(max_examples=40)
def test_a_run_in_targets_learns_from_at_least_as_many(rows: int, per_row: int, asked: int) -> None:
    recipe = recipe_of(f"run.steps={asked}tok", f"run.save_every={asked}tok")
    lengths = Lengths.of(recipe, DataSize(rows, rows * per_row))
    assert lengths.steps == ceil(asked / (8 * per_row))
    assert lengths.save == Every(lengths.steps)


def test_wall_time_stays_wall_time() -> None:
    recipe = recipe_of("run.save_every=30min", "run.eval_every=2h", "report.log_every=90s")
    lengths = Lengths.of(recipe, DataSize.assumed(recipe))
    assert (lengths.save, lengths.evaluate, lengths.log) == (Every(0, 1800), Every(0, 7200), Every(0, 90))


@given(st.integers(1, 60), st.lists(st.integers(1, 60), min_size=1, max_size=50))
def test_wall_time_is_due_once_it_has_passed_and_never_before(period: int, steps: list[int]) -> None:
    """Between two times it is done lie at least the period, and less than the period and the step that ended it."""
    now = last = 0
    for number, seconds in enumerate(steps, 1):
        now += seconds
        if Every(seconds=period).due(number, now - last):
            assert period <= now - last < period + seconds
            last = now
        assert now - last < period


@given(st.integers(1, 50), st.floats(0, 1e9))
def test_steps_are_due_whatever_the_clock_says(every: int, waited: float) -> None:
    assert [n for n in range(1, 101) if Every(every).due(n, waited)] == list(range(every, 101, every))


@given(st.integers(1, 100), st.floats(0, 1e9))
def test_never_is_never_due(step: int, waited: float) -> None:
    assert not Every()
    assert not Every().due(step, waited)
