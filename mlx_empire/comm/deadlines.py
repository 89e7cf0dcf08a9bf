"""When a rank counts as lost: how long each phase may take, and who is to blame when nothing goes on. No MPI here.

Every rank says again and again where it is, for how long nothing has gone on there, whether it waits for others, and
how long it may take there. From that alone anyone can judge:

- silent:   no sign for longer than the deadline of the place where the rank was last: it is stopped, dead or cut off;
- stuck:    it says itself that nothing goes on, and does not wait for others;
- deadlock: all ranks wait, for one another.

A rank that waits for a slow one is never to blame, nor is the slow one within its deadline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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
    """The ranks that are lost, and why; empty while all is well. `sights`: by rank."""
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
