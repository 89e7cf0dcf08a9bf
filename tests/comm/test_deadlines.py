"""When a rank counts as lost, late or to blame, and what is learned from the first steps."""

from __future__ import annotations

import pytest

from mlx_empire.comm.deadlines import FACTOR, LEARNING_STEPS, Deadlines, Sight, Sign, judge, late

WORKS = Sign("forward", 5, stalled=1.0, deadline=10.0)
WAITS = Sign("forward", 5, stalled=9000.0, waits=True, deadline=10.0)


def stuck(seconds: float, phase: str = "forward") -> Sign:
    return Sign(phase, 5, stalled=seconds, deadline=10.0)


@pytest.mark.parametrize(
    ("sights", "expected"),
    [
        ([Sight(WORKS), Sight(WORKS)], {}),
        ([Sight(WAITS), Sight(WORKS), Sight(WAITS)], {}),
        ([Sight(WAITS), Sight(stuck(10.0)), Sight(WAITS)], {}),
        ([Sight(WORKS), Sight(WORKS, silent=9.9)], {}),
        ([Sight(WAITS), Sight(WORKS, silent=10.1)], {1: "no sign of life for 10.1 s, last seen in forward of step 5"}),
        ([Sight(WAITS), Sight(stuck(11.0))], {1: "stuck in forward of step 5: no progress for 11 s"}),
        ([Sight(Sign("start", deadline=9.0), silent=9.5)], {0: "no sign of life for 9.5 s, last seen in start"}),
        ([Sight(WAITS), Sight(WAITS, gone=True), Sight(WORKS, silent=99.0, gone=True), Sight(WORKS)], {}),
        (
            [Sight(WAITS), Sight(WORKS, silent=12.0), Sight(stuck(12.0))],
            {1: "no sign of life for 12 s", 2: "stuck in forward of step 5"},
        ),
    ],
)  # fmt: skip
def test_who_is_lost(sights: list[Sight], expected: dict[int, str]) -> None:
    lost = judge(sights)
    assert lost.keys() == expected.keys()
    for rank, why in expected.items():
        assert lost[rank].startswith(why)
        assert lost[rank].endswith(f"(deadline {sights[rank].sign.deadline:.3g} s)")


def test_ranks_that_wait_for_one_another_are_all_lost() -> None:
    short, long = (Sign("backward", 2, stalled=t, waits=True, deadline=10.0) for t in (9.0, 11.0))
    assert judge([Sight(short), Sight(long)]) == {}
    assert judge([Sight(long), Sight(long)]).keys() == {0, 1}
    assert judge([Sight(long), Sight(long), Sight(WORKS, gone=True)]).keys() == {0, 1}, "who left cannot help"
    patient = Sign("evaluate", 2, stalled=11.0, waits=True, deadline=100.0)
    assert judge([Sight(long), Sight(patient)]) == {}


def test_who_is_late() -> None:
    sights = [Sight(WAITS), Sight(stuck(6.0, "optimizer")), Sight(WORKS, silent=6.0), Sight(WORKS)]
    found = late(sights)
    assert found.keys() == {1, 2}
    assert found[1].startswith("is late: still in optimizer of step 5")
    assert found[2].startswith("is late: silent, last seen in forward of step 5")
    assert late([Sight(s.sign, s.silent, gone=True) for s in sights]) == {}


def test_deadlines_are_learned_from_the_first_steps() -> None:
    deadlines = Deadlines(ceiling=1000.0, floor=20.0)
    deadlines.observe(Sign("load", 0, 400.0))
    for step in range(40, 40 + LEARNING_STEPS + 1):  # a run that was continued
        assert deadlines.of("forward") == 1000.0
        for stalled in (0.5, 7.0, 3.0):
            deadlines.observe(Sign("forward", step, stalled))
        deadlines.observe(Sign("forward", step, 900.0, waits=True))
        deadlines.observe(Sign("backward", step, 0.1))
        deadlines.observe(Sign("evaluate", step, 0.1))
    assert deadlines.of("forward") == FACTOR * 7.0
    assert deadlines.of("backward") == 20.0, "not below the floor"
    assert deadlines.of("evaluate") == deadlines.of("save-write") == deadlines.of("load") == 1000.0
    deadlines.observe(Sign("forward", 59, 30.0))
    assert deadlines.of("forward") == 300.0, "a slow step gives more time to the next"
    deadlines.observe(Sign("forward", 60, 500.0))
    assert deadlines.of("forward") == 1000.0, "not above the ceiling"
