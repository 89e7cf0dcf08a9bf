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
class Sign:
    """A rank's sign of life: phase, step, seconds without progress, whether it waits, seconds that it may take."""

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
class Sight:
    """A rank as another sees it: its last sign, seconds since it came, and whether it has said goodbye."""

    sign: Sign
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

    def observe(self, sign: Sign) -> None:
        """Learn from what this rank did itself."""
        self._first = self._first or sign.step
        self._steps = max(self._steps, sign.step - self._first)
        if not sign.waits:
            self._longest[sign.phase] = max(self._longest.get(sign.phase, 0.0), sign.stalled)

    def of(self, phase: str) -> float:
        """The deadline of a phase."""
        if phase not in LEARNED or self._steps < LEARNING_STEPS:
            return self.ceiling
        return min(max(FACTOR * self._longest.get(phase, 0.0), self.floor), self.ceiling)


def judge(sights: Sequence[Sight]) -> dict[int, str]:
    """The ranks that are lost, and why; empty while all is well. `sights`: by rank."""
    lost = {}
    for rank, sight in enumerate(sights):
        sign = sight.sign
        if sight.gone:
            continue
        if sight.silent > sign.deadline:
            lost[rank] = f"no sign of life for {_seconds(sight.silent)}, last seen in {sign.place}"
        elif not sign.waits and sign.stalled > sign.deadline:
            lost[rank] = f"stuck in {sign.place}: no progress for {_seconds(sign.stalled)}"
    here = {rank: sight.sign for rank, sight in enumerate(sights) if not sight.gone}
    if not lost and here and all(sign.waits for sign in here.values()):
        shortest = min(sign.stalled for sign in here.values())
        if shortest > max(sign.deadline for sign in here.values()):
            why = f"waits for other ranks that wait themselves, for {_seconds(shortest)}"
            lost = {rank: f"{why}, in {sign.place}" for rank, sign in here.items()}
    return {rank: f"{why} (deadline {_seconds(sights[rank].sign.deadline)})" for rank, why in lost.items()}


def late(sights: Sequence[Sight]) -> dict[int, str]:
    """The stragglers: ranks that have used half of their deadline, and what they do."""
    found = {}
    for rank, sight in enumerate(sights):
        sign = sight.sign
        used = max(sight.silent, 0.0 if sign.waits else sign.stalled)
        if not sight.gone and used > sign.deadline / 2:
            silent = "silent, last seen" if sight.silent > sign.deadline / 2 else "still"
            deadline = _seconds(sign.deadline)
            found[rank] = (
                f"is late: {silent} in {sign.place}; the run is ended when it shows nothing for {deadline}"
            )
    return found


def _seconds(value: float) -> str:
    return f"{value:.3g} s"
