"""Curves: what stays of many points, and what a smoothed loss is."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
from support.run_folders import lines, made_long, step

from mlx_empire.page import series as columns
from mlx_empire.page.charts import charts_of
from mlx_empire.page.series import MOST_POINTS, SMOOTHING, Curve, Series
from mlx_empire.page.watch import WatchedRun
from mlx_empire.report.metrics import MetricsCursor


@pytest.mark.parametrize("count", [1, 2, 1999, 2000, 2001, 4000, 100_000])
def test_a_thinned_curve_keeps_its_ends_its_peaks_and_its_order(count: int) -> None:
    chance = random.Random(count)
    values = [chance.gauss(0, 1) for _ in range(count)]
    curve = Curve()
    for place, value in enumerate(values):
        curve.add(3 * place, value)
    x, y = curve.points()
    assert len(x) == len(y) <= MOST_POINTS
    assert (x[0], x[-1]) == (0, 3 * (count - 1))
    assert x == sorted(set(x))
    assert [float(f"{values[step // 3]:.6g}") for step in x] == y
    assert max(y) == pytest.approx(max(values), rel=1e-5)
    assert min(y) == pytest.approx(min(values), rel=1e-5)
    if count <= MOST_POINTS:
        assert len(x) == count
    else:
        assert len(x) > MOST_POINTS / 2


def test_a_curve_can_grow_while_its_points_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread reads a run's new lines: what is sent is a copy."""
    curve, extremes = Curve(), columns._extremes
    for number in range(10):
        curve.add(number, 1.0 + number)

    def meanwhile(values: np.ndarray, most: int) -> np.ndarray:
        curve.add(10, 11.0)
        return extremes(values, most)

    monkeypatch.setattr(columns, "_extremes", meanwhile)
    assert curve.points(0, 6)[0][-1] == 9
    assert len(curve) == 11


def test_a_smoothed_loss_is_the_mean_weighted_by_age() -> None:
    series, losses = Series(), [5.0, 3.0, 4.0, 1.0]
    for number, loss in enumerate(losses, 1):
        series.add(step(number, loss=loss))
    weights = [SMOOTHING ** (3 - i) for i in range(4)]
    expected = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert series.curves["smoothed"].y[-1] == pytest.approx(expected)
    assert series.curves["smoothed"].y[0] == 5.0


def test_what_is_not_finite_is_no_point_and_is_marked() -> None:
    series = Series()
    series.add(step(1))
    series.add(step(2, loss=None, grad_norm=None))
    series.add(step(3, skipped=True))
    series.add({"step": 4, "loss": "much", "waited_for": [1], "scores": 2})
    assert list(series.curves["loss"].x) == [1, 3]
    assert (series.lost, series.spikes) == ([2, 4], [3])


def test_a_cursor_reads_what_is_new_and_starts_again_where_the_file_went_back(tmp_path: Path) -> None:
    file, cursor = tmp_path / "metrics.jsonl", MetricsCursor(tmp_path)

    def read() -> tuple[bool, list[int]]:
        anew, found = cursor.follow()
        return anew, [record["step"] for record in found]

    assert read() == (False, [])
    file.write_text(lines(map(step, (1, 2))) + '{"step": 3, "lo')
    assert read() == (False, [1, 2])
    assert read() == (False, [])
    with file.open("a") as more:
        more.write('ss": 1.0}\nno record\n' + lines([step(4)]))
    assert read() == (False, [3, 4])
    file.write_text(lines(map(step, (1, 2))))  # cut back
    assert read() == (True, [1, 2])
    other = [step(1), step(2, time=7777.25), step(3), step(4)]
    (tmp_path / "draft").write_text(lines(other))  # replaced by one that is longer
    (tmp_path / "draft").rename(file)
    assert read() == (True, [1, 2, 3, 4])
    file.unlink()
    assert read() == (True, [])


@pytest.mark.slow
def test_of_100000_steps_at_most_2000_points_a_curve_are_kept_to_be_drawn(tmp_path: Path) -> None:
    look = WatchedRun(made_long(tmp_path / "run"), "run").look()
    assert look is not None
    assert look.series.steps == 100_000
    documents = [chart.document() for chart in charts_of(look)]
    sizes = {(c["key"], one["name"]): len(one["points"][0]) for c in documents for one in c["lines"]}
    assert len(sizes) >= 8
    assert max(sizes.values()) <= MOST_POINTS
    assert sizes["loss", "training"] > MOST_POINTS / 2
    assert math.isclose(look.overview.pace or 0, 10.0)
