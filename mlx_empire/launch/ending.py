"""Decides how a run ended: complete, stopped on request, refused (starting again would end the same way) or lost.

mpirun's own exit code is not believed: it is 0 after a machine was lost. Complete is what wrote `COMPLETE`. An exit
code means what errors.py says only where a rank said it in words; a process that merely left with 3 is a lost one.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal

from mlx_empire.launch.events import Events, RankExit

COMPLETE, LOST, STOPPED = 0, 75, 143
FINAL = (3, 64, 65, 70, 143)  # what ranks may say that no restart would change
# How ranks end that were asked to stop before they listened, or twice.
ENDED_BY_US = (signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL)


@dataclass(frozen=True)
class Ending:
    """How one launch ended; `code` is the exit code if it is the last one. None: not known."""

    kind: Literal["complete", "stopped", "refused", "lost"]
    code: int
    cause: str
    rank: int | None = None
    host: str | None = None
    place: tuple[str, int] | None = None
    died: bool = False  # so that `cause` is what happened to it, not what it said

    @property
    def sentence(self) -> str:
        """The rank, its machine and the cause."""
        named = [] if self.rank is None else [f"rank {self.rank}"]
        who = " on ".join([*named, *([self.host] if self.host else [])])
        if not who or self.cause.startswith(who):
            return self.cause
        return f"{who} {self.cause}" if self.died else f"{who}: {self.cause}"


def ending_of(events: Events, mpirun_code: int, complete: bool, asked: bool) -> Ending:
    """The verdict on a launch that is over.

    mpirun_code: its exit code, negative for a signal. complete: `COMPLETE` lies in the run's folder. asked: somebody
    asked this run to stop.
    """
    told = [failure.code for failure in events.failures] + events.told
    if complete:
        code = next((code for code in told if code), COMPLETE)
        return Ending(
            "complete", code, "the run is complete" if not code else "complete, with trouble on the way"
        )
    if STOPPED in told or (asked and not any(code in FINAL for code in told)):
        by_us = all(ended.signal in ENDED_BY_US for ended in events.exits)
        whole = STOPPED in told or (by_us and not any(told))
        why = events.failures[0].message if events.failures else "stopped on request"
        return Ending("stopped", STOPPED if whole else LOST, why)
    final = [failure for failure in events.failures if failure.code in FINAL]
    killed = [ended for ended in events.exits if ended.signal is not None]
    if final or (events.failures and not killed):
        first = (final or events.failures)[0]
        place = events.place_of(first.rank)
        if final:
            return Ending("refused", first.code, first.message, first.rank, first.host, place)
        return Ending("lost", LOST, first.message, first.rank, first.host, place)
    if events.exits:
        return _dead((killed or events.exits)[0], events)
    if mpirun_code == 0:
        return Ending("lost", LOST, "mpirun says that all went well, but the run wrote no COMPLETE")
    how = f"by signal {-mpirun_code}" if mpirun_code < 0 else f"with exit code {mpirun_code}"
    return Ending("lost", LOST, f"mpirun ended {how} and said no more")


def _dead(ended: RankExit, events: Events) -> Ending:
    """What mpirun says, completed by where the ranks said they were."""
    rank, host = ended.rank, ended.host
    if host is None and rank is not None:
        host = events.hosts.get(rank)
    if rank is None and host is not None:
        rank = next((r for r, name in events.hosts.items() if _label(name) == _label(host)), None)
    place = None if rank is None else events.place_of(rank)
    return Ending("lost", LOST, ended.how, rank, host, place, died=True)


def _label(host: str) -> str:
    return host.split(".")[0].lower()
