import math

import pytest

from mlx_empire.report.text import NodeRow, bar, duration, fraction, level, number
from mlx_empire.sizes import GIB, amount


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 KiB"),
        (100_000, "98 KiB"),
        (2**20 - 1, "1024 KiB"),
        (2**20, "1.00 MiB"),
        (-3 * GIB, "-3.00 GiB"),
        (9.996 * GIB, "10.0 GiB"),
        (99.96 * GIB, "100 GiB"),
        (512 * 2**20, "512 MiB"),
        (1.5 * GIB, "1.50 GiB"),
        (24.96 * GIB, "25.0 GiB"),
        (464 * GIB, "464 GiB"),
    ],
)
def test_amounts(count, text):
    assert amount(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3600, "1 h 00 min"),
        (86399, "23 h 59 min"),
        (3 * 86400 + 7200, "3 d 2 h"),
        (math.nan, "?"),
        (math.inf, "?"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_numbers_that_are_missing_or_not_finite():
    assert number(1.23456, ".2f") == "1.23"
    assert number(None, ".2f") == number(math.inf, ".2f") == number(math.nan, ".2f") == "nan"


@pytest.mark.parametrize(("part", "full"), [(-1, 0), (0, 0), (0.5, 5), (0.94, 9), (1, 10), (7, 10)])
def test_a_bar_has_its_width_whatever_the_part(part, full):
    assert bar(part, 10, "#.") == "#" * full + "." * (10 - full)


def test_colours_follow_the_distance_to_the_limit():
    assert [level(part) for part in (0, 0.79, 0.8, 0.94, 0.95, 1.5, math.inf)] == [
        *["green"] * 2,
        *["yellow"] * 2,
        *["red"] * 3,
    ]
    assert fraction(1, 0) == math.inf


def test_a_node_fits_up_to_its_limit():
    assert NodeRow("a", "king", 1.0, GIB, GIB).fits
    assert not NodeRow("a", "king", 1.0, GIB + 1, GIB).fits
