"""Durations against arithmetic done by hand and against exact fractions."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_empire.recipe.duration import Duration

WRITTEN = {
    100: Duration(100, "steps"),
    0: Duration(0, "steps"),
    "3%": Duration(3, "percent"),
    "0.5%": Duration(0.5, "percent"),
    "20ktok": Duration(20_000, "tokens"),
    "5Mtok": Duration(5_000_000, "tokens"),
    "1.5Btok": Duration(1_500_000_000, "tokens"),
    "2Ttok": Duration(2 * 10**12, "tokens"),
    "7tok": Duration(7, "tokens"),
    "1ep": Duration(1, "epochs"),
    "0.5 ep": Duration(0.5, "epochs"),
    "90s": Duration(90, "seconds"),
    "0.5s": Duration(0.5, "seconds"),
    "30min": Duration(1800, "seconds"),
    "1.5 h": Duration(5400, "seconds"),
    "0.1h": Duration(360, "seconds"),
}


@pytest.mark.parametrize(("written", "duration"), WRITTEN.items())
def test_parse(written: object, duration: Duration) -> None:
    assert Duration.parse(written) == duration


@pytest.mark.parametrize(
    "written",
    [
        "",
        "ep",
        "-1ep",
        "5 Mtoks",
        "5mtok",
        "101%",
        "1e3ep",
        "0.5tok",
        "1.00001ktok",
        "٣%",
        "nan%",
        1.5,
        True,
        None,
        -1,
        10**13,
        "9999999Ttok",
        [3],
        "3%\n",
        "30m",
        "1d",
        "-5min",
        "1h30min",
        "999999999h",
    ],
)
def test_parse_refuses(written: object) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the loader turns it into the message
        Duration.parse(written)


IN_STEPS = {
    7: 7,
    0: 0,
    "0%": 0,
    "3%": 30,
    "0.01%": 1,
    "0.14%": 1,
    "0.16%": 2,
    "100%": 1000,
    "1tok": 1,
    "512tok": 1,
    "513tok": 2,
    "1ktok": 2,
    "1ep": 30,
    "0.1ep": 3,
    "0.101ep": 4,
}


@pytest.mark.parametrize(
    ("written", "steps"),
    IN_STEPS.items(),
)
def test_to_steps_of_a_run_of_1000_steps_of_512_tokens_30_to_an_epoch(written: object, steps: int) -> None:
    assert Duration.parse(written).to_steps(1000, 512, 30) == steps


def test_an_epoch_that_does_not_end_with_a_step_is_completed() -> None:
    assert Duration(1, "epochs").to_steps(None, 512, 7.25) == 8


@given(st.fractions(0, 100, max_denominator=10**6), st.integers(1, 10**6))
def test_percent_is_the_nearest_step(percent: Fraction, total: int) -> None:
    duration = Duration(float(percent), "percent")
    steps = duration.to_steps(total, 1, 1)
    assert 0 <= steps <= total
    if steps > 1:
        assert abs(steps - percent * total / 100) <= Fraction(1, 2) + Fraction(1, 10**6)


@given(
    st.one_of(
        st.builds(Duration, st.integers(0, 10**12), st.just("steps")),
        st.builds(Duration, st.integers(0, 10**15), st.just("tokens")),
        st.builds(Duration, st.decimals(0, 100, places=9).map(float), st.just("percent")),
        st.builds(Duration, st.floats(1e-9, 1e6), st.just("epochs")),
        st.builds(Duration, st.integers(0, 10**9), st.just("seconds")),
        st.builds(Duration, st.floats(1e-9, 1e9), st.just("seconds")),
    )
)
def test_text_round_trip(duration: Duration) -> None:
    text = str(duration)
    assert Duration.parse(int(text) if duration.unit == "steps" else text) == duration


@given(st.fractions(0, 10**5, max_denominator=1000), st.sampled_from([("s", 1), ("min", 60), ("h", 3600)]))
def test_wall_time_is_so_many_seconds(number: Fraction, unit: tuple[str, int]) -> None:
    written = f"{float(number):.6f}"
    suffix, scale = unit
    assert Duration.parse(written + suffix).value == pytest.approx(
        float(Fraction(written) * scale), rel=1e-15
    )


@pytest.mark.parametrize(
    ("value", "text"), [(5400, "90min"), (7200, "2h"), (45, "45s"), (3600.5, "3600.5s"), (0, "0h")]
)
def test_wall_time_is_written_in_the_largest_unit_that_divides_it(value: float, text: str) -> None:
    assert str(Duration(value, "seconds")) == text
