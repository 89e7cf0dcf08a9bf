"""How a launch ended is judged by what the run wrote and its ranks said, not by mpirun's exit code."""

from __future__ import annotations

import pytest

from mlx_empire.launch.ending import Events, Failure, RankExit, ending_of

NAN = Failure(65, "the loss is nan", 1, "soldier-1")
SILENT = Failure(75, "rank 1 on soldier-1 has been silent for 60 s", 0, "king")
KILLED = RankExit("was killed by SIGKILL", 1, "soldier-1", signal=9)
ABORT = RankExit("ended all ranks (exit code 75)", 0, code=75)


def events(*what: Failure | RankExit | int) -> Events:
    return Events(
        places={1: {"MainThread": ("optimizer", 7)}},
        hosts={0: "king", 1: "soldier-1.local"},
        failures=[w for w in what if isinstance(w, Failure)],
        exits=[w for w in what if isinstance(w, RankExit)],
        told=[w for w in what if isinstance(w, int)],
    )


@pytest.mark.parametrize(
    ("of", "mpirun", "complete", "asked", "kind", "code"),
    [
        (events(), 0, True, False, "complete", 0),
        (events(KILLED), 137, True, False, "complete", 0),  # it wrote COMPLETE before
        (events(Failure(75, "a save failed", 0, "king")), 75, True, False, "complete", 75),
        (events(), 0, False, False, "lost", 75),  # mpirun's 0 proves nothing
        (events(143), 143, False, False, "stopped", 143),  # the file `stop`
        (events(), -9, False, True, "stopped", 143),  # before a rank could listen
        (events(KILLED), 137, False, True, "stopped", 143),
        (events(Failure(143, "step-000007 is saved", 0, "king")), 143, False, True, "stopped", 143),
        (events(Failure(75, "step-000007 could not be saved", 0, "king")), 75, False, True, "stopped", 75),
        (events(RankExit("was killed by SIGSEGV", 1, "king", signal=11)), 139, False, True, "stopped", 75),
        (events(NAN, 65), 65, False, True, "refused", 65),  # a request does not hide damage
        (events(NAN, KILLED), 65, False, False, "refused", 65),
        (events(Failure(64, "no such key", 0, "king"), 64), 64, False, False, "refused", 64),
        (events(Failure(3, "does not fit", 0, "king"), 3), 3, False, False, "refused", 3),
        (events(RankExit("left (exit code 3)", 1, code=3)), 3, False, False, "lost", 75),  # said by nobody
        (events(SILENT, ABORT), 75, False, False, "lost", 75),
        (events(), 213, False, False, "lost", 75),
    ],
)
def test_the_verdict(of: Events, mpirun: int, complete: bool, asked: bool, kind: str, code: int) -> None:
    ending = ending_of(of, mpirun, complete, asked)
    assert (ending.kind, ending.code) == (kind, code)


def test_a_killed_rank_is_named_with_its_place_whoever_complains() -> None:
    ending = ending_of(events(SILENT, ABORT, KILLED), 75, False, False)
    assert ending.sentence == "rank 1 on soldier-1 was killed by SIGKILL"
    assert ending.place == ("optimizer", 7)


def test_a_rank_that_nobody_killed_is_named_by_the_one_that_noticed() -> None:
    ending = ending_of(events(ABORT, SILENT), 75, False, False)
    assert ending.sentence == "rank 0 on king: rank 1 on soldier-1 has been silent for 60 s"


def test_a_rank_that_is_blamed_by_name_is_named_once() -> None:
    found = Failure(75, "rank 1 on soldier-1: no sign of life for 60 s", 1, "soldier-1")
    assert ending_of(events(found), 75, False, False).sentence == found.message


def test_a_lost_machine_is_named_with_the_rank_on_it() -> None:
    ending = ending_of(events(RankExit("is out of reach", host="soldier-1")), 0, False, False)
    assert ending.sentence == "rank 1 on soldier-1 is out of reach"
    assert ending.place == ("optimizer", 7)
