"""What counts as a leap, what is done about it, and that a continued run decides alike."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlx_empire.engine.numerics import SpikeWatch, Verdict, spike_score
from mlx_empire.errors import NumericsError


def noise(count: int, seed: int = 0) -> list[float]:
    return (2.0 + 0.05 * np.random.default_rng(seed).standard_normal(count)).tolist()


def fed(watch: SpikeWatch, values: list[float], first: int = 1) -> list[Verdict]:
    return [watch.judge(step, value, 1.0 + value / 10) for step, value in enumerate(values, first)]


def test_the_score_is_that_of_a_normal_distribution() -> None:
    values = noise(1001)
    sigma = float(np.std(values))
    assert spike_score(float(np.median(values)) + 5 * sigma, values) == pytest.approx(5.0, rel=0.1)
    assert spike_score(3.0, [*values, 1e9, 1e9]) == pytest.approx(spike_score(3.0, values), rel=0.02), (
        "outliers do not count"
    )


def test_noise_descent_and_the_first_steps_are_no_leaps() -> None:
    for values in (noise(300), np.linspace(11, 2, 300).tolist(), [9.0] + [1.0] * 10, [2.0] * 100 + [2.02]):
        assert fed(SpikeWatch("skip"), values) == [Verdict()] * len(values)


@pytest.mark.parametrize("mode", ["off", "log", "skip"])
def test_a_leap_is_logged_or_skipped(mode: str) -> None:
    watch = SpikeWatch(mode)  # type: ignore[arg-type]
    fed(watch, noise(40))
    verdict = watch.judge(41, 6.0, 1.2)
    assert verdict.skip == (mode == "skip")
    assert (verdict.note is None) == (mode == "off")
    if verdict.note:
        assert verdict.note.startswith("step 41: loss 6 leaps from 1.99")
    assert (watch.losses[-1:] == [6.0]) == (mode == "log")
    norm = watch.judge(42, 2.0, 50.0)
    assert ("gradient norm 50 leaps from 1.19" in (norm.note or "")) == (mode != "off")


def test_skips_are_bounded_within_the_window() -> None:
    watch = SpikeWatch("skip", window=20, max_skips=2)
    fed(watch, noise(30))
    assert [watch.judge(step, 9.0, 1.2).skip for step in (31, 40)] == [True, True]
    assert watch.judge(55, 9.0, 1.2).skip, "step 31 is out of the window"
    with pytest.raises(NumericsError, match=r"data of steps 40, 55, 56") as raised:
        watch.judge(56, 9.0, 1.2)
    assert raised.value.shared


def test_a_continued_run_decides_alike() -> None:
    values = [*noise(50), 8.0, *noise(50, 1), 3.0, 9.0, *noise(20, 2)]
    whole, first, second = (SpikeWatch("skip", window=32) for _ in range(3))
    expected = fed(whole, values)
    assert sum(verdict.skip for verdict in expected) == 3
    assert fed(first, values[:60]) == expected[:60]
    second.from_json(json.loads(json.dumps(first.to_json())))
    assert second == first
    assert fed(second, values[60:], 61) == expected[60:]
