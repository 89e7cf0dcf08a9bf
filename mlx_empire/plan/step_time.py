"""How long a step takes: plays every rank's actions (`schedule`) on lanes, each of which does one thing at a time.

A rank has a compute lane (the main thread), a queue of exchanges (the communication thread) and one of what its disk
writes and reads; its card has two directions. The rules:

1. compute   forward, stash, head, backward, reuse, embed and update follow one another, also where the engine has the
             CPU do embed while the next micro-batch's backward runs;
2. begin     gather, reduce, replicate and renew are queued when the compute lane reaches them, and do not stop it;
3. exchange  an exchange begins on a rank when the one before has ended there. A card sends and receives at the wire's
             rate, each rank's bytes in each direction one after the other; a rank is done when it has sent and received
             its own, so the rank with most bytes (the hub of reductions) holds up who sends to it. Relayed in a ring,
             pieces are passed on as they come. Contributions are added on the host piece by piece as they come, all
             of them before the next exchange;
4. disk      offload and prefetch are queued likewise, one after the other;
5. wait      bind, settle and adopt stop the compute lane until their exchange is done, evict and fetch until the disk's
             work is; the norm until all ranks are there and have swapped two small messages.

So forward hides its gathers only behind forward, and gathers and reductions take turns. Nothing here depends on the
machine it runs on: the seconds of an action are the caller's (`Costs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from mlx_empire.plan.actions import Action, Reader
from mlx_empire.plan.schedule import training_step
from mlx_empire.plan.shards import ShardPlan
from mlx_empire.plan.step_traffic import Part, StepTraffic
from mlx_empire.plan.traffic import PIECE_BYTES, Route
from mlx_empire.plan.workload import Workload, step_shape

COMPUTE, EXCHANGE, ADD, WAIT, DISK = "compute", "exchange", "add", "wait", "disk"
_WAITED_FOR = {"gather": "bind", "reduce": "settle", "replicate": "settle", "renew": "adopt"}
_DISK_S = {"evict": "offload", "fetch": "prefetch"}


class Costs(Protocol):
    """Seconds of one rank's work."""

    def compute(self, action: Action) -> float:
        """Of forward, stash, head, backward, reuse, embed or update, as often as the action stands for."""
        ...

    def add(self, nbytes: int) -> float:
        """Of adding `nbytes` of contributions to totals, on the host."""
        ...

    def disk(self, action: Action) -> float:
        """Of offload or prefetch, as often as the action stands for."""
        ...


@dataclass(frozen=True)
class Link:
    """A wire: bytes per second in each direction, seconds until an exchange's first byte is there, and whether each
    pair of ranks has its own (`per` "pair") or each rank one card for all."""

    rate: float
    per: str = "card"
    latency: float = 0.0


class Event(NamedTuple):
    """What a lane of a rank did, in seconds since the step's beginning."""

    rank: int
    lane: str
    what: str
    unit: int
    start: float
    end: float


class RankLanes(Reader):
    """One rank's actions, played as far as the exchanges that it waits for are timed."""

    def __init__(self, rank: int, actions: Sequence[Action], costs: Costs) -> None:
        self.now = 0.0
        self.events: list[Event] = []
        self.begun: list[tuple[Action, float]] = []  # every exchange in order, and when it was queued
        self.done: list[float] = []  # when those that are timed were done here
        self.arrived: list[float] = []  # by norm, when this rank came to it
        self.met: list[float] = []  # by norm that is timed, when the last rank came
        self._rank, self._actions, self._costs = rank, actions, costs
        self._next = self._norms = 0
        self._latest: dict[tuple[str, int], int] = {}  # the exchange that a wait for a unit is for
        self._disk_done = 0.0  # when all is written and read that was queued
        self._on_disk: dict[tuple[str, int, int], float] = {}  # by kind, unit and micro-batch: when that is

    @property
    def finished(self) -> bool:
        """Whether the step is done here."""
        return self._next == len(self._actions)

    def advance(self) -> None:
        """Play on, up to an action that waits for something that is not timed yet."""
        while not self.finished and self._timed(self._actions[self._next]):
            self.play(self._actions[self._next : self._next + 1])
            self._next += 1

    def _timed(self, action: Action) -> bool:
        if action.kind == "norm":
            if len(self.arrived) == self._norms:
                self.arrived.append(self.now)
            return len(self.met) > self._norms
        return self._latest.get((action.kind, action.unit), -1) < len(self.done)

    def _work(self, action: Action) -> None:
        self._until(COMPUTE, action, self.now + self._costs.compute(action))

    def _begin(self, action: Action) -> None:
        self._latest[_WAITED_FOR[action.kind], action.unit] = len(self.begun)
        self.begun.append((action, self.now))

    def _wait(self, action: Action) -> None:
        number = self._latest.get((action.kind, action.unit))
        if number is not None:
            self._until(WAIT, action, self.done[number])

    def _queue(self, action: Action) -> None:
        start = max(self.now, self._disk_done)
        self._disk_done = start + self._costs.disk(action)
        self._on_disk[action.kind, action.unit, action.micro] = self._disk_done
        self.events.append(Event(self._rank, DISK, action.kind, action.unit, start, self._disk_done))

    def _wait_for_disk(self, action: Action) -> None:
        self._until(WAIT, action, self._on_disk.pop((_DISK_S[action.kind], action.unit, action.micro)))

    def norm(self, action: Action) -> None:
        """All ranks meet."""
        self._until(WAIT, action, self.met[self._norms])
        self._norms += 1

    forward = stash = head = backward = reuse = embed = update = _work
    gather = reduce = replicate = renew = _begin
    bind = settle = adopt = _wait
    offload = prefetch = _queue
    evict = fetch = _wait_for_disk
    capture = score = free = keep = Reader.nothing

    def _until(self, lane: str, action: Action, end: float) -> None:
        if end > self.now:
            self.events.append(Event(self._rank, lane, action.kind, action.unit, self.now, end))
            self.now = end


@dataclass(frozen=True)
class Timeline:
    """A step as events; `seconds` until the last rank is done; `wire_seconds`: that the busiest card is in use.

    An event of the exchange lane begins when the exchange does, so it holds waiting for other ranks as well.
    """

    events: tuple[Event, ...]
    seconds: float
    wire_seconds: float

    def busy(self, rank: int, lane: str) -> float:
        """Seconds that a rank's lane was at work."""
        return sum(e.end - e.start for e in self.events if e.rank == rank and e.lane == lane)


def step_timeline(
    plan: ShardPlan, work: Workload, costs: Sequence[Costs], link: Link, route: Route | None = None
) -> Timeline:
    """The lanes of all ranks through one step; `costs` by rank, `route` that of the recipe or another."""
    shapes = [step_shape(plan, work, rank) for rank in range(plan.world_size)]
    ranks = [
        RankLanes(r, tuple(training_step(shape, fold="micro-batches")), own)
        for r, (shape, own) in enumerate(zip(shapes, costs, strict=True))
    ]
    wires = _Wires(plan, work, costs, link, route or work.route)
    while not all(rank.finished for rank in ranks):
        before = [(rank.now, len(rank.done), len(rank.met)) for rank in ranks]
        for rank in ranks:
            rank.advance()
        wires.time(ranks)
        _meet(ranks, 2 * link.latency)
        stuck = before == [(rank.now, len(rank.done), len(rank.met)) for rank in ranks]
        assert not stuck or all(rank.finished for rank in ranks), "ranks wait for one another"
    events = [event for rank in ranks for event in rank.events] + wires.events
    seconds = max((event.end for event in events), default=0.0)
    return Timeline(tuple(events), seconds, wires.busiest() / link.rate)


def _meet(ranks: Sequence[RankLanes], seconds: float) -> None:
    """Time the norms to which every rank has come; `seconds`: of swapping them."""
    for number in range(len(ranks[0].met), min(len(rank.arrived) for rank in ranks)):
        last = max(rank.arrived[number] for rank in ranks) + (seconds if len(ranks) > 1 else 0.0)
        for rank in ranks:
            rank.met.append(last)


class _Wires:
    """Times exchanges in order, each once all ranks have queued it."""

    def __init__(
        self, plan: ShardPlan, work: Workload, costs: Sequence[Costs], link: Link, route: Route
    ) -> None:
        self._costs, self._link, self._piece = costs, link, min(work.bucket_bytes, PIECE_BYTES)
        self._traffic = StepTraffic(plan, work, route)
        self.events: list[Event] = []
        self._sent = np.zeros((plan.world_size, plan.world_size), np.int64)

    def busiest(self) -> int:
        """Bytes of the busiest card, or of the busiest cable, in one direction."""
        if self._link.per == "pair":
            return int(self._sent.max())
        return int(max(self._sent.sum(axis=0).max(), self._sent.sum(axis=1).max()))

    def time(self, ranks: Sequence[RankLanes]) -> None:
        """Give every rank the ends of the exchanges that can be timed by now."""
        for number in range(len(ranks[0].done), min(len(rank.begun) for rank in ranks)):
            action = ranks[0].begun[number][0]
            starts = [max(rank.begun[number][1], rank.done[-1] if rank.done else 0.0) for rank in ranks]
            for part in self._traffic.parts(action):  # a segment after the other, as they are carried out
                self._sent += part.sent
                ends = self._ends(part, starts)
                adding = [self._costs[r].add(int(nbytes)) for r, nbytes in enumerate(part.added)]
                done = [self._added(part, r, start, ends[r], adding[r]) for r, start in enumerate(starts)]
                for r, (start, end) in enumerate(zip(starts, ends, strict=True)):
                    self._note(r, EXCHANGE, action, start, end)
                    self._note(r, ADD, action, done[r] - adding[r], done[r])
                starts = done
            for rank, end in zip(ranks, starts, strict=True):
                rank.done.append(end)

    def _note(self, rank: int, lane: str, action: Action, start: float, end: float) -> None:
        if end > start:
            self.events.append(Event(rank, lane, action.kind, action.unit, start, end))

    def _added(self, part: Part, rank: int, start: float, end: float, adding: float) -> float:
        """When a rank has added all: it begins with the first piece that has come, and ends with the last one."""
        pieces = max(1, -(-int(part.sent[:, rank].max()) // self._piece))
        return max(start + (end - start) / pieces + adding, end + adding / pieces)

    def _ends(self, part: Part, starts: list[float]) -> list[float]:
        """When each rank has sent and received its part."""
        if not part.sent.any():
            return starts
        timed = self._round_the_ring if part.relayed else self._direct
        return [float(end) for end in timed(part.sent, starts)]

    def _direct(self, sent: np.ndarray, starts: list[float]) -> list[float]:
        """Every rank sends to every other one; by card all of a rank's bytes in a direction follow one another."""
        size, rate = len(starts), self._link.rate
        seconds = sent / rate
        if self._link.per == "pair":
            ready = np.maximum(np.array(starts)[:, None], np.array(starts)[None])
            ends = np.where(sent > 0, ready + seconds + self._link.latency, 0.0)
            return [max(starts[r], ends[r].max(), ends[:, r].max()) for r in range(size)]
        sending = [starts[r] + seconds[r].sum() for r in range(size)]
        receiving = []
        for to in range(size):
            now = starts[to]
            for source in sorted(range(size), key=starts.__getitem__):
                if sent[source][to]:
                    now = max(now, starts[source] + self._link.latency) + seconds[source][to]
            receiving.append(now)
        done: list[float] = []
        for r in range(size):  # who sends to it may be busy with others, and so may be who takes its bytes
            peers = [sending[s] for s in range(size) if sent[s][r]] + [
                receiving[t] for t in range(size) if sent[r][t]
            ]
            done.append(max(sending[r], receiving[r], *peers))
        return done

    def _round_the_ring(self, sent: np.ndarray, starts: list[float]) -> list[float]:
        """Every rank sends its own interval to the next one, then passes on the others', nearest owner first, piece by
        piece as they come. A link stands still only where its next piece is not there yet."""
        size, rate, latency = len(starts), self._link.rate, self._link.latency
        total = sent.sum() / (size - 1)
        own = [float(total - sent[r - 1][r]) for r in range(size)]
        free = [max(starts[r], starts[(r + 1) % size]) for r in range(size)]  # when the link to the next is
        there = [(0.0, 0.0)] * size  # by rank, when first and last piece of what it passes on next had come
        for distance in range(size - 1):
            came = []
            for r in range(size):
                nbytes = own[r - distance]
                if not nbytes:
                    came.append((0.0, 0.0))
                    continue
                piece = min(nbytes, self._piece) / rate
                begin = max(free[r], there[r][0])
                free[r] = max(begin + nbytes / rate, there[r][1] + piece)
                came.append((begin + piece + latency, free[r] + latency))
            there = [came[r - 1] for r in range(size)]
        return [max(free[r], there[r][1]) for r in range(size)]
