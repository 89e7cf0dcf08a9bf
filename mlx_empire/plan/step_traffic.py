"""What a training step moves: plays the step's actions (`schedule`) on wires and counts bytes from rank to rank."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mlx_empire.plan.actions import Action, Reader
from mlx_empire.plan.schedule import folded_step
from mlx_empire.plan.shards import Segment, ShardPlan
from mlx_empire.plan.traffic import Matrix, Route, all_gather_bytes, reduce_scatter_bytes, resolve_route
from mlx_empire.plan.workload import Workload, step_shape

FINISHED_BYTES = 4  # of an element of a finished sum, which stage 0 gives to every rank


class Part(NamedTuple):
    """One segment's messages in an exchange: bytes `sent` [source][destination], and whether they go round a ring.

    `added`: bytes of contributions, its own included, that each rank adds to its totals.
    """

    sent: np.ndarray
    relayed: bool
    added: np.ndarray


class StepTraffic(Reader):
    """Bytes that each rank sends each other one: `gathered` weights and `reduced` gradients, [source][destination]."""

    def __init__(self, plan: ShardPlan, work: Workload, route: Route | None = None) -> None:
        self._plan, self._layout, self._route = plan, work.layout, route or work.route
        self.gathered = np.zeros((plan.world_size, plan.world_size), np.int64)
        self.reduced = np.zeros_like(self.gathered)

    def parts(self, action: Action) -> Iterator[Part]:
        """The exchange that an action begins, segment by segment as it is carried out."""
        for segment in self._segments(action):
            if action.kind == "reduce":
                flags = tuple(self._layout.contributes(action.round))
                sent = reduce_scatter(segment.edges, segment.itemsize, flags)
                added = np.diff(segment.edges) * segment.itemsize * sum(flags)
                yield Part(sent, False, added)
            else:
                itemsize = FINISHED_BYTES if action.kind == "replicate" else segment.itemsize
                relayed = resolve_route(self._route, segment.edges) == "relay"
                sent = all_gather(segment.edges, itemsize, self._route)
                yield Part(sent, relayed, np.zeros(self._plan.world_size, np.int64))

    def _segments(self, action: Action) -> list[Segment]:
        """Those that move: frozen weights only where they are not kept whole, none where every rank has the update."""
        segments = self._plan.units[action.unit].segments
        if action.kind == "gather":
            return list(segments)
        if action.kind == "renew" and self._plan.zero_stage == 0:
            return []
        return [segment for segment in segments if segment.kind != "frozen"]

    def _gathered(self, action: Action) -> None:
        for part in self.parts(action):
            self.gathered += part.sent

    def _reduced(self, action: Action) -> None:
        for part in self.parts(action):
            self.reduced += action.times * part.sent

    gather = renew = _gathered
    reduce = replicate = _reduced
    bind = free = adopt = settle = keep = Reader.nothing
    capture = forward = stash = head = score = backward = reuse = Reader.nothing
    embed = norm = update = offload = evict = prefetch = fetch = Reader.nothing


def step_matrices(plan: ShardPlan, work: Workload, route: Route | None = None) -> tuple[Matrix, Matrix]:
    """(gathers, reductions) of a training step, evaluation not counted; `route`: that of the recipe, or another.

    Every rank has the same collectives, so the first one's actions are played.
    """
    reader = StepTraffic(plan, work, route)
    reader.play(folded_step(step_shape(plan, work, 0)))
    return reader.gathered.tolist(), reader.reduced.tolist()


def step_traffic(plan: ShardPlan, work: Workload) -> Matrix:
    """All bytes that each rank sends each other one in a training step."""
    gathered, reduced = (np.array(matrix) for matrix in step_matrices(plan, work))
    total: Matrix = (gathered + reduced).tolist()
    return total


@lru_cache(maxsize=4096)
def all_gather(edges: tuple[int, ...], itemsize: int, route: Route) -> np.ndarray:
    """`all_gather_bytes` as an array: layers of a kind ask the same."""
    return np.array(all_gather_bytes(edges, itemsize, route), np.int64)


@lru_cache(maxsize=4096)
def reduce_scatter(edges: tuple[int, ...], itemsize: int, contributes: tuple[bool, ...]) -> np.ndarray:
    """`reduce_scatter_bytes` as an array."""
    return np.array(reduce_scatter_bytes(edges, itemsize, contributes), np.int64)
