"""When a rank counts as lost, late or to blame, and what is learned from the first steps."""

from __future__ import annotations

import pytest

from mlx_empire.comm.watchdog import FACTOR, LEARNING_STEPS, Deadlines, PeerStatus, Status, late, lost_ranks

WORKS = Status("forward", 5, stalled=1.0, deadline=10.0)
WAITS = Status("forward", 5, stalled=9000.0, waits=True, deadline=10.0)


def stuck(seconds: float, phase: str = "forward") -> Status:
    return Status(phase, 5, stalled=seconds, deadline=10.0)


@pytest.mark.parametrize(
    ("peers", "expected"),
    [
        ([PeerStatus(WORKS), PeerStatus(WORKS)], {}),
        ([PeerStatus(WAITS), PeerStatus(WORKS), PeerStatus(WAITS)], {}),
        ([PeerStatus(WAITS), PeerStatus(stuck(10.0)), PeerStatus(WAITS)], {}),
        ([PeerStatus(WORKS), PeerStatus(WORKS, silent=9.9)], {}),
        (
            [PeerStatus(WAITS), PeerStatus(WORKS, silent=10.1)],
            {1: "no sign of life for 10.1 s, last seen in forward of step 5"},
        ),
        ([PeerStatus(WAITS), PeerStatus(stuck(11.0))], {1: "stuck in forward of step 5: no progress for 11 s"}),
        ([PeerStatus(Status("start", deadline=9.0), silent=9.5)], {0: "no sign of life for 9.5 s, last seen in start"}),
        (
            [
                PeerStatus(WAITS),
                PeerStatus(WAITS, gone=True),
                PeerStatus(WORKS, silent=99.0, gone=True),
                PeerStatus(WORKS),
            ],
            {},
        ),
        (
            [PeerStatus(WAITS), PeerStatus(WORKS, silent=12.0), PeerStatus(stuck(12.0))],
            {1: "no sign of life for 12 s", 2: "stuck in forward of step 5"},
        ),
    ],
)  # fmt: skip
def test_who_is_lost(peers: list[PeerStatus], expected: dict[int, str]) -> None:
    lost = lost_ranks(peers)
    assert lost.keys() == expected.keys()
    for rank, why in expected.items():
        assert lost[rank].startswith(why)
        assert lost[rank].endswith(f"(deadline {peers[rank].status.deadline:.3g} s)")


def test_ranks_that_wait_for_one_another_are_all_lost() -> None:
    short, long = (Status("backward", 2, stalled=t, waits=True, deadline=10.0) for t in (9.0, 11.0))
    assert lost_ranks([PeerStatus(short), PeerStatus(long)]) == {}
    assert lost_ranks([PeerStatus(long), PeerStatus(long)]).keys() == {0, 1}
    assert lost_ranks([PeerStatus(long), PeerStatus(long), PeerStatus(WORKS, gone=True)]).keys() == {0, 1}, (
        "who left cannot help"
    )
    patient = Status("evaluate", 2, stalled=11.0, waits=True, deadline=100.0)
    assert lost_ranks([PeerStatus(long), PeerStatus(patient)]) == {}


def test_who_is_late() -> None:
    peers = [
        PeerStatus(WAITS),
        PeerStatus(stuck(6.0, "optimizer")),
        PeerStatus(WORKS, silent=6.0),
        PeerStatus(WORKS),
    ]
    found = late(peers)
    assert found.keys() == {1, 2}
    assert found[1].startswith("is late: still in optimizer of step 5")
    assert found[2].startswith("is late: silent, last seen in forward of step 5")
    assert late([PeerStatus(s.status, s.silent, gone=True) for s in peers]) == {}


def test_deadlines_are_learned_from_the_first_steps() -> None:
    deadlines = Deadlines(ceiling=1000.0, floor=20.0)
    deadlines.observe(Status("load", 0, 400.0))
    for step in range(40, 40 + LEARNING_STEPS + 1):  # a run that was continued
        assert deadlines.of("forward") == 1000.0
        for stalled in (0.5, 7.0, 3.0):
            deadlines.observe(Status("forward", step, stalled))
        deadlines.observe(Status("forward", step, 900.0, waits=True))
        deadlines.observe(Status("backward", step, 0.1))
        deadlines.observe(Status("evaluate", step, 0.1))
    assert deadlines.of("forward") == FACTOR * 7.0
    assert deadlines.of("backward") == 20.0, "not below the floor"
    assert deadlines.of("evaluate") == deadlines.of("save-write") == deadlines.of("load") == 1000.0
    deadlines.observe(Status("forward", 59, 30.0))
    assert deadlines.of("forward") == 300.0, "a slow step gives more time to the next"
    deadlines.observe(Status("forward", 60, 500.0))
    assert deadlines.of("forward") == 1000.0, "not above the ceiling"
