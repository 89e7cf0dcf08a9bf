"""Which tensor and which rank: asked only when a number is not finite, so it may take its time.

Decides what is looked at. Nothing here changes anything; every function is collective where it says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_empire.comm.protocol import Communicator
from mlx_empire.engine.store import LiveChunk, ShardStore
from mlx_empire.errors import NumericsError
from mlx_empire.model.spec import BLOCK
from mlx_empire.optim.norm import block_sums


class GradientError(NumericsError):
    """The summed gradient of `tensors` is not finite; whose contribution it was is not known yet."""

    shared = True

    def __init__(self, tensors: Sequence[str]) -> None:
        super().__init__(f"the gradient of {some_of(tensors)} is not finite; no weight was changed")
        self.tensors = tensors


def some_of(tensors: Sequence[str]) -> str:
    """The first name, and how many there are."""
    return tensors[0] if len(tensors) == 1 else f"{tensors[0]} (and of {len(tensors) - 1} other tensors)"


def bad_totals(
    store: ShardStore,
    totals: dict[int, list[mx.array]],
    segments: Collection[tuple[int, int]],
    comm: Communicator,
) -> list[str]:
    """The tensors whose summed gradient is not finite, or too large to be squared, in the plan's order. Collective.

    segments: (unit, position among the unit's trained segments) that are known to hold such a tensor.
    """
    own = set()
    for unit, position in segments:
        total = totals[unit][position]
        trained = [s for s, segment in enumerate(store.plan.units[unit].segments) if segment.kind != "frozen"]
        segment = store.plan.units[unit].segments[trained[position]]
        first = store.plan.state_interval(segment, comm.rank)[0] // BLOCK
        for chunk in store.chunks[unit][trained[position]]:
            a = chunk.spec.start_row - first
            if chunk.spec.name not in own and not _finite(block_sums(total[a : a + chunk.spec.rows])):
                own.add(chunk.spec.name)
    return _in_order(store, [name for names in comm.gather_json(sorted(own)) for name in names])


def bad_weights(store: ShardStore, comm: Communicator) -> list[tuple[str, int]]:
    """(tensor, lowest rank that holds such a part of it) of all weights that are not finite. Collective."""
    own = {c.spec.name for c in _chunks(store) if not _finite(block_sums(c.weights))}
    ranks: dict[str, int] = {}
    for rank, names in enumerate(comm.gather_json(sorted(own))):
        for name in names:
            ranks.setdefault(name, rank)
    return [(name, ranks[name]) for name in _in_order(store, ranks)]


def _chunks(store: ShardStore) -> Iterator[LiveChunk]:
    """This rank's chunks of floating-point weights."""
    for unit in store.chunks:
        for segment in unit:
            yield from (c for c in segment if mx.issubdtype(c.weights.dtype, mx.floating))


def _finite(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all())


def _in_order(store: ShardStore, names: Collection[str]) -> list[str]:
    """Without doubles, in the plan's order."""
    wanted = set(names)
    return [name for name in store.plan.tensors if name in wanted]
