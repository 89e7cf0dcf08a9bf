"""What is known of a run from what its ranks and mpirun say on stderr: where each rank is, and how it ended.

Ranks speak in marked lines (`progress`), which are taken out. Open MPI announces deaths between two dashed lines,
wrapped at some column; those that are understood are taken out too, because the failure report says the same once and
in order. Everything else is for the user.

From that follows how the run ended: complete, stopped on request, refused (starting again would end the same way) or
lost. mpirun's own exit code is not believed: it is 0 after a machine was lost. Complete is what wrote `COMPLETE`. An
exit code means what errors.py says only where a rank said it in words; a process that merely left with 3 is a lost
one.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_empire.progress import MARK

MAIN_THREAD = "MainThread"
_DASHES = re.compile(r"-{60,}\s*$")
_MOST_LINES = 60  # of one announcement


@dataclass(frozen=True)
class RankExit:
    """How mpirun says that a process or a machine was lost; None is what it does not say."""

    how: str
    rank: int | None = None
    host: str | None = None
    code: int | None = None  # of exit()
    signal: int | None = None


@dataclass(frozen=True)
class Failure:
    """What a rank said before it ended the run."""

    code: int
    message: str
    rank: int
    host: str


@dataclass
class Events:
    """One launch so far. `places`: (phase, step) by rank and thread; `pids`: on each rank's machine; `told`: exit codes
    that all ranks agreed on; `notices`: (kind, sentence) for the owner that nobody has sent yet."""

    places: dict[int, dict[str, tuple[str, int]]] = field(default_factory=dict)
    hosts: dict[int, str] = field(default_factory=dict)
    pids: dict[int, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    exits: list[RankExit] = field(default_factory=list)
    told: list[int] = field(default_factory=list)
    notices: list[tuple[str, str]] = field(default_factory=list)

    def note(self, event: dict[str, Any]) -> None:
        """A rank's line. KeyError, TypeError or ValueError for one that is not what a rank sends."""
        rank, host = int(event["rank"]), str(event["host"])
        match event["event"]:
            case "place":
                self.hosts[rank] = host
                self.pids[rank] = int(event["pid"])
                if self.failing:  # to end a stopped process mpirun first continues it
                    return
                place = str(event["phase"]), int(event["step"])
                self.places.setdefault(rank, {})[str(event["thread"])] = place
            case "failure":
                self.failures.append(Failure(int(event["code"]), str(event["message"]), rank, host))
            case "exit":
                self.told.append(int(event["code"]))
            case "notice":
                self.notices.append((str(event["kind"]), str(event["message"])))

    @property
    def failing(self) -> bool:
        """Whether the run is known to end."""
        return bool(self.failures or self.exits or self.told)

    @property
    def step(self) -> int:
        """The latest step that any rank has begun."""
        return max((step for of in self.places.values() for _, step in of.values()), default=0)

    def place_of(self, rank: int) -> tuple[str, int] | None:
        """(phase, step) of a rank: where its main thread is, and in brackets where another is that began later."""
        threads = self.places.get(rank, {})
        phase, step = threads.get(MAIN_THREAD, ("", 0))
        others = [f"{p} beside it" for t, (p, s) in threads.items() if t != MAIN_THREAD and s == step and p]
        named = ", ".join([*([phase] if phase else []), *others])
        return (named, step) if named else None


class Listener:
    """Sorts stderr as it comes: `feed` returns what the user should see."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._partial = b""
        self._block: list[str] | None = None

    def feed(self, data: bytes) -> str:
        """The next bytes; an incomplete last line is kept until it is whole."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        return "".join(map(self._line, (line.decode(errors="replace") + "\n" for line in lines)))

    def close(self) -> str:
        """What was kept back, at the end."""
        kept, self._partial = self._partial.decode(errors="replace"), b""
        shown = self._line(kept) if kept else ""
        block, self._block = self._block or [], None
        return shown + self._announced(block)

    def _line(self, line: str) -> str:
        before, mark, event = line.partition(MARK)
        if mark:
            # Two ranks' lines may have run into one another: the next one says where they are.
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                self._events.note(json.loads(event))
            return self._line(before + "\n") if before.strip() else ""
        if self._block is None:
            if not _DASHES.match(line):
                return line
            self._block = [line]
            return ""
        self._block.append(line)
        if not _DASHES.match(line) and len(self._block) < _MOST_LINES:
            return ""
        block, self._block = self._block, None
        return self._announced(block)

    def _announced(self, block: list[str]) -> str:
        ended = read_announcement("".join(block))
        if ended is None:
            return "".join(block)
        if ended not in self._events.exits:
            self._events.exits.append(ended)
        return ""


def read_announcement(text: str) -> RankExit | None:
    """The death that one of Open MPI 5's announcements tells of, or None."""
    flat = " ".join(text.split())
    for pattern, made in _ANNOUNCEMENTS:
        found = re.search(pattern, flat)
        if found:
            return made(found)
    return None


def _killed(found: re.Match[str]) -> RankExit:
    number = int(found[3])
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return RankExit(f"was killed by {name}", int(found[1]), found[2], signal=number)


_ANNOUNCEMENTS: tuple[tuple[str, Callable[[re.Match[str]], RankExit]], ...] = (
    (r"process rank (\d+) with PID \d+ on node (\S+) exited on signal (\d+)", _killed),
    (
        r"process rank (\d+) with PID \d+ on node (\S+) exiting improperly",
        lambda found: RankExit(
            "left before the run was complete (exit code 0)", int(found[1]), found[2], code=0
        ),
    ),
    (
        r"Process name: \[\S+@\d+,(\d+)\] Exit code: (\d+)",
        lambda found: RankExit(
            f"left before the run was complete (exit code {found[2]})", int(found[1]), code=int(found[2])
        ),
    ),
    (
        r"MPI_ABORT was invoked on rank (\d+) .*?Errorcode: (\d+)",
        lambda found: RankExit(f"ended all ranks (exit code {found[2]})", int(found[1]), code=int(found[2])),
    ),
    (
        r"process rank (\d+) with PID \d+ on node (\S+) calling \"?abort",
        lambda found: RankExit("ended all ranks", int(found[1]), found[2]),
    ),
    (
        r"daemon failed to report back.*?Remote host: (\S+)",
        lambda found: RankExit(
            "is out of reach: Open MPI's daemon there is gone or could not start", host=found[1]
        ),
    ),
    (
        r"lost communication with a remote daemon.*?Remote daemon: \S+ on node (\S+)",
        lambda found: RankExit("is out of reach: mpirun lost its connection", host=found[1]),
    ),
)


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
