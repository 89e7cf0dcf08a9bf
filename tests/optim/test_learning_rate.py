"""Schedules: properties, and MLX's own as an independent reference."""

from __future__ import annotations

import mlx.optimizers as theirs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_empire.optim.choose import LearningRate

TYPES = st.sampled_from(["constant", "cosine", "linear"])
FRACTION = st.floats(0, 1)


@st.composite
def schedules(draw: st.DrawFn) -> LearningRate:
    total = draw(st.integers(1, 10_000))
    return LearningRate(
        draw(TYPES), draw(st.floats(1e-8, 1)), draw(st.integers(0, total)), total, draw(FRACTION)
    )


@given(schedules(), st.data())
def test_rises_then_falls_and_never_below_the_final_rate(rate: LearningRate, data: st.DataObject) -> None:
    step = data.draw(st.integers(1, rate.total_steps))
    now, after = rate(step), rate(step + 1)
    slack = 1e-12 * rate.base
    assert 0 <= now <= rate.base
    if step < rate.warmup_steps:
        assert now == pytest.approx(rate.base * step / rate.warmup_steps)
        assert now < after
    else:
        assert after <= now + slack
        assert now >= rate.final * rate.base - slack


@given(schedules())
def test_first_peak_and_last_step(rate: LearningRate) -> None:
    assert rate(1) == pytest.approx(rate.base / max(rate.warmup_steps, 1))
    assert rate(max(rate.warmup_steps, 1)) == rate.base
    assert rate(rate.total_steps) > 0  # no step is spent at rate zero
    expected = rate.base if rate.type == "constant" else rate.final * rate.base
    for beyond in (1, 2, 1000):
        assert rate(rate.total_steps + beyond) == pytest.approx(expected, abs=1e-9 * rate.base)


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_decays_are_those_of_mlx(final: float) -> None:
    cosine, linear = (
        theirs.cosine_decay(1e-3, 50, final * 1e-3),
        theirs.linear_schedule(1e-3, final * 1e-3, 50),
    )
    for step in range(1, 51):
        for kind, reference in (("cosine", cosine), ("linear", linear)):
            ours = LearningRate(kind, 1e-3, 0, 50, final)(step)
            assert ours == pytest.approx(float(reference(step - 1)), rel=1e-4, abs=1e-9)


def test_a_warmup_longer_than_the_run_is_cut_off_with_it() -> None:
    rate = LearningRate("cosine", 1.0, 100, 5)
    assert [rate(step) for step in range(1, 6)] == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])
