"""Filling the shards: every rank reads the model's folder, or rank 0 alone has it and sends each rank its part.

Either way tensors pass one at a time, so no rank holds more than its shard plus one unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_empire.comm.buffers import DTYPES, host_view
from mlx_empire.comm.protocol import Communicator
from mlx_empire.engine.store import ShardStore
from mlx_empire.formats.source import WeightSource
from mlx_empire.model.spec import ModelSpec
from mlx_empire.plan.shards import Placement, Segment, Unit


def fill_from_own(store: ShardStore, source: WeightSource) -> None:
    """Each rank reads what it keeps from its own source."""
    for unit in store.plan.units:
        store.load(unit.index, source.unit(unit.index))


def fill_from_root(
    store: ShardStore, spec: ModelSpec, source: WeightSource | None, comm: Communicator
) -> None:
    """Rank 0 reads; every tensor is scattered to its owners, and gathered where weights stay whole. Collective."""
    assert (source is not None) == (comm.rank == 0), "rank 0 alone has a source"
    for unit in store.plan.units:
        with store.loading(unit):
            _fill_unit(store, spec, unit, source, comm)


def _fill_unit(
    store: ShardStore, spec: ModelSpec, unit: Unit, source: WeightSource | None, comm: Communicator
) -> None:
    buffers, views, starts = store.landing(unit)
    tensors = source.unit(unit.index) if source is not None else None
    for tensor in spec.units[unit.index].tensors:
        _, s, placement = store.plan.tensors[tensor.name]
        flat = None
        if tensors is not None:
            found, array = next(tensors)
            assert found.name == tensor.name, "a source yields tensors in the spec's order"
            flat = host_view(array.astype(DTYPES[unit.segments[s].dtype]))
        _scatter(comm, unit.segments[s], placement, flat, views[s], starts[s])
    if store.keeps_whole:
        for view, segment in zip(views, unit.segments, strict=True):
            comm.all_gather(view, segment.edges)
    store.landed(unit, buffers)


def _scatter(
    comm: Communicator,
    segment: Segment,
    placement: Placement,
    flat: np.ndarray | None,
    view: np.ndarray,
    start: int,
) -> None:
    """Send one tensor's elements to their owners; `view` is what this rank keeps, from element `start` on."""
    edges = _within(segment.edges, placement)
    a, b = edges[comm.rank] + placement.start, edges[comm.rank + 1] + placement.start
    comm.scatter(flat, edges, view[a - start : b - start], 0)


def _within(edges: Sequence[int], placement: Placement) -> list[int]:
    """The segment's edges as seen from inside one tensor."""
    size = placement.tensor.size
    return [min(max(edge - placement.start, 0), size) for edge in edges]
