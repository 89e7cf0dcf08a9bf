"""How a launch ended is judged by what the run wrote and its ranks said, not by mpirun's exit code."""

from __future__ import annotations

import pytest

from mlx_empire.launch.ending import judge
from mlx_empire.launch.events import Account, Death, Failure

NAN = Failure(65, "the loss is nan", 1, "soldier-1")
SILENT = Failure(75, "rank 1 on soldier-1 has been silent for 60 s", 0, "king")
KILLED = Death("was killed by SIGKILL", 1, "soldier-1", signal=9)
ABORT = Death("ended all ranks (exit code 75)", 0, code=75)


def account(*what: Failure | Death | int) -> Account:
    return Account(
        places={1: {"MainThread": ("optimizer", 7)}},
        hosts={0: "king", 1: "soldier-1.local"},
        failures=[w for w in what if isinstance(w, Failure)],
        deaths=[w for w in what if isinstance(w, Death)],
        told=[w for w in what if isinstance(w, int)],
    )


@pytest.mark.parametrize(
    ("of", "mpirun", "complete", "asked", "kind", "code"),
    [
        (account(), 0, True, False, "complete", 0),
        (account(KILLED), 137, True, False, "complete", 0),  # it wrote COMPLETE before
        (account(Failure(75, "a save failed", 0, "king")), 75, True, False, "complete", 75),
        (account(), 0, False, False, "lost", 75),  # mpirun's 0 proves nothing
        (account(143), 143, False, False, "stopped", 143),  # the file `stop`
        (account(), -9, False, True, "stopped", 143),  # before a rank could listen
        (account(KILLED), 137, False, True, "stopped", 143),
        (account(Failure(143, "step-000007 is saved", 0, "king")), 143, False, True, "stopped", 143),
        (account(Failure(75, "step-000007 could not be saved", 0, "king")), 75, False, True, "stopped", 75),
        (account(Death("was killed by SIGSEGV", 1, "king", signal=11)), 139, False, True, "stopped", 75),
        (account(NAN, 65), 65, False, True, "refused", 65),  # a request does not hide damage
        (account(NAN, KILLED), 65, False, False, "refused", 65),
        (account(Failure(64, "no such key", 0, "king"), 64), 64, False, False, "refused", 64),
        (account(Failure(3, "does not fit", 0, "king"), 3), 3, False, False, "refused", 3),
        (account(Death("left (exit code 3)", 1, code=3)), 3, False, False, "lost", 75),  # said by nobody
        (account(SILENT, ABORT), 75, False, False, "lost", 75),
        (account(), 213, False, False, "lost", 75),
    ],
)
def test_the_verdict(of: Account, mpirun: int, complete: bool, asked: bool, kind: str, code: int) -> None:
    ending = judge(of, mpirun, complete, asked)
    assert (ending.kind, ending.code) == (kind, code)


def test_a_killed_rank_is_named_with_its_place_whoever_complains() -> None:
    ending = judge(account(SILENT, ABORT, KILLED), 75, False, False)
    assert ending.sentence == "rank 1 on soldier-1 was killed by SIGKILL"
    assert ending.place == ("optimizer", 7)


def test_a_rank_that_nobody_killed_is_named_by_the_one_that_noticed() -> None:
    ending = judge(account(ABORT, SILENT), 75, False, False)
    assert ending.sentence == "rank 0 on king: rank 1 on soldier-1 has been silent for 60 s"


def test_a_rank_that_is_blamed_by_name_is_named_once() -> None:
    found = Failure(75, "rank 1 on soldier-1: no sign of life for 60 s", 1, "soldier-1")
    assert judge(account(found), 75, False, False).sentence == found.message


def test_a_lost_machine_is_named_with_the_rank_on_it() -> None:
    ending = judge(account(Death("is out of reach", host="soldier-1")), 0, False, False)
    assert ending.sentence == "rank 1 on soldier-1 is out of reach"
    assert ending.place == ("optimizer", 7)
