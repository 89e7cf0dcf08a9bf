"""A thread beside the work on every rank that ends a run which does not go on, instead of letting it wait for ever.

What happens, again and again: look where the main thread is (`progress.places`), tell all other ranks, hear where
they are, and judge (`lost_ranks`). When a rank is lost, whoever finds it tells all others; every rank that can prints
the stacks of its threads; then one of them says who was lost and why, and all end with exit code 75. A thread can do
that while the main one is stuck in `mx.eval` or in MPI; a signal handler could not.

The process may itself have been stopped (SIGSTOP, a machine asleep). Then all others seem silent: the time that this
thread did not run is not held against anyone.

When a rank counts as lost. Every rank says again and again where it is, for how long nothing has gone on there,
whether it waits for others, and how long it may take there. From that alone anyone can judge:

- silent:   no sign for longer than the deadline of the place where the rank was last: it is stopped, dead or cut off;
- stuck:    it says itself that nothing goes on, and does not wait for others;
- deadlock: all ranks wait, for one another.

A rank that waits for a slow one is never to blame, nor is the slow one within its deadline.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from mlx_empire import progress
from mlx_empire.comm.failure import end
from mlx_empire.comm.protocol import Communicator
from mlx_empire.errors import LostRankError

LEARNED = ("data", "forward", "backward", "collectives", "optimizer")  # what every step does alike
LEARNING_STEPS = 3
FACTOR = 10.0


@dataclass(frozen=True)
class Status:
    """A rank's heartbeat: phase, step, seconds without progress, whether it waits, seconds that it may take."""

    phase: str = "start"
    step: int = 0
    stalled: float = 0.0
    waits: bool = False
    deadline: float = 0.0

    @property
    def place(self) -> str:
        """In words."""
        return f"{self.phase} of step {self.step}" if self.step else self.phase


@dataclass(frozen=True)
class PeerStatus:
    """A rank as another sees it: its last heartbeat, seconds since it came, and whether it has said goodbye."""

    status: Status
    silent: float = 0.0
    gone: bool = False


@dataclass
class Deadlines:
    """How long each phase may show no progress, in seconds: `ceiling` at first and where phases are not alike; for the
    phases of a step, once a few steps are done, FACTOR times the longest so far, at least `floor`.

    Phases shorter than the watchdog's tick may never be seen; the floor is theirs.
    """

    ceiling: float
    floor: float
    _longest: dict[str, float] = field(default_factory=dict)
    _first: int = 0  # step that was seen
    _steps: int = 0  # that have begun since

    def observe(self, status: Status) -> None:
        """Learn from what this rank did itself."""
        self._first = self._first or status.step
        self._steps = max(self._steps, status.step - self._first)
        if not status.waits:
            self._longest[status.phase] = max(self._longest.get(status.phase, 0.0), status.stalled)

    def of(self, phase: str) -> float:
        """The deadline of a phase."""
        if phase not in LEARNED or self._steps < LEARNING_STEPS:
            return self.ceiling
        return min(max(FACTOR * self._longest.get(phase, 0.0), self.floor), self.ceiling)


def lost_ranks(peers: Sequence[PeerStatus]) -> dict[int, str]:
    """The ranks that are lost, and why; empty while all is well. `peers`: by rank."""
    lost = {}
    for rank, peer in enumerate(peers):
        status = peer.status
        if peer.gone:
            continue
        if peer.silent > status.deadline:
            lost[rank] = f"no sign of life for {_seconds(peer.silent)}, last seen in {status.place}"
        elif not status.waits and status.stalled > status.deadline:
            lost[rank] = f"stuck in {status.place}: no progress for {_seconds(status.stalled)}"
    here = {rank: peer.status for rank, peer in enumerate(peers) if not peer.gone}
    if not lost and here and all(status.waits for status in here.values()):
        shortest = min(status.stalled for status in here.values())
        if shortest > max(status.deadline for status in here.values()):
            why = f"waits for other ranks that wait themselves, for {_seconds(shortest)}"
            lost = {rank: f"{why}, in {status.place}" for rank, status in here.items()}
    return {rank: f"{why} (deadline {_seconds(peers[rank].status.deadline)})" for rank, why in lost.items()}


def late(peers: Sequence[PeerStatus]) -> dict[int, str]:
    """The stragglers: ranks that have used half of their deadline, and what they do."""
    found = {}
    for rank, peer in enumerate(peers):
        status = peer.status
        used = max(peer.silent, 0.0 if status.waits else status.stalled)
        if not peer.gone and used > status.deadline / 2:
            silent = "silent, last seen" if peer.silent > status.deadline / 2 else "still"
            deadline = _seconds(status.deadline)
            found[rank] = (
                f"is late: {silent} in {status.place}; the run is ended when it shows nothing for {deadline}"
            )
    return found


def _seconds(value: float) -> str:
    return f"{value:.3g} s"


TICK_SECONDS = 0.25
STACKS_SECONDS = 1.5  # in which all ranks print their stacks before the run is ended
SPEAKER_SECONDS = 10.0  # after which a rank ends the run though another one should have
CLOSING_SECONDS = 5.0
PAUSE_SECONDS = 0.5  # a later tick than that was a pause of this process
LONG = ("save", "retention")  # phases of another thread that a step may have to wait for


class Watchdog:
    """Watches from `with` to its end; made in the thread that is to be watched, on all ranks. Collective.

    ceiling, floor: seconds, see `Deadlines`.
    """

    def __init__(self, comm: Communicator, ceiling: float, floor: float) -> None:
        self._comm, self._heartbeat = comm, comm.heartbeat()
        self._deadlines = Deadlines(ceiling, min(floor, ceiling))
        self._main = threading.current_thread().name
        self._closing = threading.Event()
        self._heard: list[tuple[float, Status]] = []  # by rank: when, and what
        self._gone: set[int] = set()
        self._told: dict[int, str] = {}
        self._since = 0.0
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._since = time.monotonic()
        first = Status(deadline=self._deadlines.ceiling)
        self._heard = [(self._since, first)] * self._comm.size
        progress.watch(True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join(CLOSING_SECONDS)
        progress.watch(False)

    def _run(self) -> None:
        last, paused = time.monotonic(), 0.0
        while not self._closing.wait(TICK_SECONDS):
            now = time.monotonic()
            missed, last = now - last - TICK_SECONDS, now
            for rank, message in self._heartbeat.receive():
                if "lost" in message:
                    self._end({int(r): why for r, why in message["lost"].items()})
                elif "bye" in message:
                    self._gone.add(rank)
                else:
                    self._heard[rank] = (now, Status(**message))
            if (
                paused > self._heard[self._comm.rank][1].deadline / 4
            ):  # not at once: it may have been meant to end
                self._say(f"{self._name(self._comm.rank)} did not run for {paused:.3g} s and goes on")
            paused = missed if missed > PAUSE_SECONDS else 0.0
            # Forgive everyone the time that this thread did not run.
            self._heard = [(min(now, heard + paused), status) for heard, status in self._heard]
            self._since = now if paused else self._since
            own = self._own_status(now)
            self._deadlines.observe(own)
            self._heard[self._comm.rank] = (now, own)
            self._heartbeat.send(vars(own))
            peers = [PeerStatus(s, now - t, r in self._gone) for r, (t, s) in enumerate(self._heard)]
            if lost := lost_ranks(peers):
                self._heartbeat.send({"lost": lost}, last=True)
                self._end(lost)
            self._name_late(late(peers))
        self._heartbeat.send({"bye": True}, last=True)

    def _own_status(self, now: float) -> Status:
        places = progress.places()
        place = places.get(self._main) or progress.Place("start", 0, self._since)
        waits = progress.waits(self._main)
        others = [p for thread, p in places.items() if thread != self._main and p.phase.startswith(LONG)]
        moved = max(progress.last_moved(), self._since, *(p.since for p in (place, *others)))
        deadline = max(self._deadlines.of(p.phase) for p in (place, *others))
        return Status(place.phase, place.step, max(0.0, now - moved), waits, deadline)

    def _name_late(self, found: Mapping[int, str]) -> None:
        """Say once who is late, on the lowest rank that is not."""
        on_time = [rank for rank in range(self._comm.size) if rank not in found]
        for rank, what in found.items():
            if self._told.get(rank) != what and (not on_time or self._comm.rank == on_time[0]):
                self._say(f"{self._name(rank)} {what}")
        self._told = dict(found)

    def _end(self, lost: Mapping[int, str]) -> None:
        """Print stacks, let everyone do so, and end all ranks."""
        sys.stderr.write(f"\n---- stacks of {self._name(self._comm.rank)}\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        able = [rank for rank in range(self._comm.size) if rank not in lost]
        speaks = self._comm.rank == (able or sorted(lost))[0]
        time.sleep(STACKS_SECONDS if speaks else SPEAKER_SECONDS)
        said = "; ".join(f"{self._name(rank)}: {why}" for rank, why in lost.items())
        message = f"mlx_empire: {said}; the run is ended, start it again"
        end(self._comm, message, LostRankError.exit_code, said, min(lost))

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._comm.hostnames[rank]}"

    def _say(self, text: str) -> None:
        print(f"mlx_empire: {text}", file=sys.stderr, flush=True)
