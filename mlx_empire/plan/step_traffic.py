"""What a training step moves: plays the step's actions (`schedule`) on wires and counts bytes from rank to rank."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from mlx_empire.plan.schedule import Action, Reader, folded_step
from mlx_empire.plan.shards import Segment, ShardPlan
from mlx_empire.plan.traffic import Matrix, Route, all_gather_bytes, reduce_scatter_bytes
from mlx_empire.plan.workload import Workload, step_shape

FINISHED_BYTES = 4  # of an element of a finished sum, which stage 0 gives to every rank


class StepTraffic(Reader):
    """Bytes that each rank sends each other one: `gathered` weights and `reduced` gradients, [source][destination]."""

    def __init__(self, plan: ShardPlan, work: Workload, route: Route | None = None) -> None:
        self._plan, self._layout, self._route = plan, work.layout, route or work.route
        self.gathered = np.zeros((plan.world_size, plan.world_size), np.int64)
        self.reduced = np.zeros_like(self.gathered)

    def gather(self, action: Action) -> None:
        for segment in self._plan.units[action.unit].segments:
            self.gathered += all_gather(segment.edges, segment.itemsize, self._route)

    def renew(self, action: Action) -> None:
        """At stage 0 every rank has updated the whole unit itself; frozen weights stay where they are."""
        for segment in self._trained(action) if self._plan.zero_stage else ():
            self.gathered += all_gather(segment.edges, segment.itemsize, self._route)

    def reduce(self, action: Action) -> None:
        flags = tuple(self._layout.contributes(action.round))
        for segment in self._trained(action):
            self.reduced += action.times * reduce_scatter(segment.edges, segment.itemsize, flags)

    def replicate(self, action: Action) -> None:
        for segment in self._trained(action):
            self.reduced += all_gather(segment.edges, FINISHED_BYTES, self._route)

    bind = free = adopt = settle = keep = Reader.nothing
    capture = forward = head = score = backward = embed = norm = update = Reader.nothing

    def _trained(self, action: Action) -> list[Segment]:
        return [s for s in self._plan.units[action.unit].segments if s.kind != "frozen"]


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
