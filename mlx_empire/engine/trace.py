"""What a rank's lanes really did in the first steps, with the names that the clock's prediction has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_empire.plan.actions import Action
from mlx_empire.plan.step_time import COMPUTE, EXCHANGE, WAIT, Event

TRACED_STEPS = 3
_WAITS = ("bind", "settle", "adopt", "evict", "fetch")
_BEGIN = ("gather", "reduce", "replicate", "renew", "offload", "prefetch")


class StepTrace:
    """Collects events of one rank, in seconds since it was made. May be told of by several threads."""

    def __init__(self, rank: int) -> None:
        self.events: list[Event] = []
        self._rank, self._start = rank, time.perf_counter()

    @contextmanager
    def action(self, action: Action) -> Iterator[None]:
        """The main thread plays an action. Those that only begin something are not events: the queue tells of it."""
        start = time.perf_counter()
        yield
        if action.kind not in _BEGIN:
            lane = WAIT if action.kind in _WAITS else COMPUTE
            self.add(lane, (action.kind, action.unit), start, time.perf_counter())

    def exchange(self, what: tuple[str, int], start: float, end: float) -> None:
        """The communication thread, the checkpoint's or that of layers' inputs has done a job."""
        self.add(EXCHANGE, what, start, end)

    def add(self, lane: str, what: tuple[str, int], start: float, end: float) -> None:
        """An event by `time.perf_counter`."""
        kind, unit = what
        self.events.append(Event(self._rank, lane, kind, unit, start - self._start, end - self._start))
