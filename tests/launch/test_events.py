"""What ranks and mpirun say is understood, in Open MPI 5.0.11's own words, however it is cut into pieces."""

from __future__ import annotations

import json

import pytest

from mlx_empire.launch.ending import Events, Failure, Listener, RankExit, read_announcement
from mlx_empire.progress import MARK

DASHES = "-" * 60 + "\n"
KILLED = """\
prterun noticed that process rank 1 with PID 15305 on node vm exited on
signal 9 (Killed).
"""
SEGMENT = """\
prterun noticed that process rank 2 with PID 15342 on node soldier-1 exited on
signal 11 (Segmentation fault).
"""
IMPROPER = """\
prterun has exited due to process rank 1 with PID 15316 on node vm exiting
improperly. There are three reasons this could occur:

1. this process did not call "init" before exiting, but others in the
job did. This can cause a job to hang indefinitely while it waits for
all processes to call "init".
"""
NON_ZERO = """\
prterun detected that one or more processes exited with non-zero status,
thus causing the job to be terminated. The first process to do so was:

   Process name: [prterun-vm-15325@1,1]
   Exit code:    3
"""
ABORTED = """\
MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD
  Proc: [[53514,1],1]
  Errorcode: 75

NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.
"""
DAEMON = """\
A daemon failed to report back after being spawned. This could
be due to several factors, including inability to find the
daemon executable, or the executable was unable to find its
required supporting libraries.

  Local host:    king
  Remote host:   soldier-1
  Daemon exit status: 137
"""
OTHER = "The value of the MCA parameter is not valid.\n"


def event(kind: str, rank: int = 0, **fields: object) -> str:
    return (
        MARK
        + json.dumps({"event": kind, "rank": rank, "host": f"mac-{rank}", "pid": 100 + rank, **fields})
        + "\n"
    )


def place(rank: int, phase: str, step: int, thread: str = "MainThread") -> str:
    return event("place", rank, thread=thread, phase=phase, step=step)


@pytest.mark.parametrize(
    ("text", "ended"),
    [
        (KILLED, RankExit("was killed by SIGKILL", 1, "vm", signal=9)),
        (SEGMENT, RankExit("was killed by SIGSEGV", 2, "soldier-1", signal=11)),
        (IMPROPER, RankExit("left before the run was complete (exit code 0)", 1, "vm", code=0)),
        (NON_ZERO, RankExit("left before the run was complete (exit code 3)", 1, code=3)),
        (ABORTED, RankExit("ended all ranks (exit code 75)", 1, code=75)),
        (
            DAEMON,
            RankExit("is out of reach: Open MPI's daemon there is gone or could not start", host="soldier-1"),
        ),
        (OTHER, None),
    ],
)
def test_open_mpis_announcements(text: str, ended: RankExit | None) -> None:
    assert read_announcement(text) == ended


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_what_is_understood_is_taken_out_and_the_rest_is_shown(size: int) -> None:
    said = (
        "a warning\n"
        + place(0, "forward", 4)
        + place(1, "backward", 4)
        + place(1, "reduce", 4, "communication")
        + DASHES
        + KILLED
        + DASHES
        + "Traceback\n"
        + DASHES
        + OTHER
        + DASHES
        + "mlx_empire: gone"
        + event("failure", 1, code=65, message="the loss is nan")
        + "no line end"
    )
    events = Events()
    listener = Listener(events)
    raw = said.encode()
    shown = "".join(listener.feed(raw[at : at + size]) for at in range(0, len(raw), size)) + listener.close()
    assert shown == "a warning\nTraceback\n" + DASHES + OTHER + DASHES + "mlx_empire: gone\nno line end"
    assert events.exits == [RankExit("was killed by SIGKILL", 1, "vm", signal=9)]
    assert events.failures == [Failure(65, "the loss is nan", 1, "mac-1")]
    assert events.place_of(0) == ("forward", 4)
    assert events.place_of(1) == ("backward, reduce beside it", 4)
    assert events.place_of(2) is None
    assert events.hosts == {0: "mac-0", 1: "mac-1"}
    assert events.pids == {0: 100, 1: 101}
    assert events.step == 4
    assert events.failing


def test_lines_that_ran_into_one_another_are_dropped() -> None:
    events = Events()
    listener = Listener(events)
    assert listener.feed(f'{MARK}{{"event": "pla{MARK}{{"event"\n'.encode()) == ""
    assert listener.feed(f'{MARK}[1]\n{MARK}{{"event": "place"}}\n'.encode()) == ""
    assert listener.feed(place(0, "data", 2).encode()) == ""
    assert events.place_of(0) == ("data", 2)


def test_an_announcement_without_an_end_is_shown_at_the_end() -> None:
    events = Events()
    listener = Listener(events)
    assert listener.feed((DASHES + OTHER).encode()) == ""
    assert listener.close() == DASHES + OTHER
    listener = Listener(events)
    listener.feed((DASHES + KILLED).encode())
    assert listener.close() == ""
    assert events.exits[0].signal == 9


def test_where_a_rank_was_is_not_what_it_does_after_the_failure() -> None:
    events = Events()
    listener = Listener(events)
    listener.feed((place(1, "forward", 2) + event("failure", 1, code=75, message="silent")).encode())
    listener.feed(place(1, "backward", 2).encode())
    assert events.place_of(1) == ("forward", 2)
