"""What the optimizer holds and needs on a rank, by its own answers: states by name, and the worst moment of an update.

Plans are numbers, so the optimizer is handed in: `StateBytes` is how it is asked. How many elements an update touches
at once follows from the plan's chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Protocol

from mlx_empire.model.spec import BLOCK
from mlx_empire.plan.shards import SHARED_ELEMENTS, Segment, ShardPlan, runs_of
from mlx_empire.recipe.update_sections import OptimizerSection


class StateSizes(Protocol):
    """The optimizer's answer for some elements: bytes of its state by name, and what an update needs besides.

    That is in bytes per element: `alone` of a chunk that is evaluated alone, `together` of small ones evaluated so;
    `in_place`: less of both where nobody else holds the weights.
    `calls_ahead`: how many such calls may be under way where none is waited for.
    """

    @property
    def alone(self) -> float: ...
    @property
    def together(self) -> float: ...
    @property
    def in_place(self) -> float: ...
    @property
    def calls_ahead(self) -> int: ...
    def items(self) -> Iterable[tuple[str, int]]: ...
    def __len__(self) -> int: ...


class StateBytes(Protocol):
    """How the optimizer is asked: for a multiple of 64 elements of a plan's dtype, `quantised` where 8 bits may be."""

    def __call__(self, elements: int, weight_dtype: str, *, quantised: bool) -> StateSizes: ...


StatesOf = Callable[[OptimizerSection], StateBytes]  # the optimizer that a recipe's section asks for


def state_sizes(plan: ShardPlan, rank: int, state_bytes: StateBytes) -> dict[str, int]:
    """The optimizer's state on `rank` by name, each beginning with `optimizer`."""
    elements: dict[tuple[str, bool], int] = {}
    for unit in plan.units:
        for segment in unit.segments:
            if segment.kind != "frozen":
                a, b = plan.state_interval(segment, rank)
                kind = segment.dtype, segment.kind == "trainable"
                elements[kind] = elements.get(kind, 0) + b - a
    named: dict[str, int] = {}
    for (dtype, quantised), count in elements.items():
        for name, size in state_bytes(count, dtype, quantised=quantised).items():
            named[f"optimizer {name}"] = named.get(f"optimizer {name}", 0) + size
    return named


def update_bytes(
    segment: Segment, start: int, stop: int, state_bytes: StateBytes, *, in_place: bool = False
) -> tuple[int, int]:
    """What updating [start, stop) of a segment needs at the worst moment beside state, gradients and new weights; and
    elements of the new weights that come at that moment. `in_place`: nobody else holds the old ones.
    """
    sizes = state_bytes(BLOCK, segment.dtype, quantised=segment.kind == "trainable")
    less = sizes.in_place if in_place else 0.0
    together, largest = largest_update(segment.rows, start, stop)
    found = (
        (int((sizes.together - less) * together), together),
        (int((sizes.alone - less) * largest), largest),
    )
    return max(found)


@lru_cache(maxsize=4096)  # most layers of a model have the same rows and intervals
def largest_update(rows: tuple[int, ...], start: int, stop: int) -> tuple[int, int]:
    """Elements of small chunks of [start, stop) that the update evaluates at once, and of the largest chunk.

    `rows`: of each tensor of the segment.
    """
    waiting = together = largest = 0
    for _, _, size, times in runs_of(rows, start, stop):
        largest = max(largest, size)
        for _ in range(min(times, 2)):  # more are like the second
            waiting = waiting + size if (waiting + size) * BLOCK <= SHARED_ELEMENTS else size
            together = max(together, waiting)
    return together * BLOCK, largest * BLOCK
