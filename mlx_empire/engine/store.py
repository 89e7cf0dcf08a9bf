"""What a rank keeps of the model, and the coming and going of whole units.

The store holds, for every segment of the ShardPlan, this rank's chunks (weights and optimizer state) and, for a
while, the *whole* buffer of a unit. A whole buffer passes through these phases:

1. ask:     `gather(i)` allocates it and queues, on the communication thread, the copy of this rank's own interval and
            the all-gather of the others'. The main thread goes on computing.
2. bind:    `bind(i)` waits for it, cuts it into tensors (views, no copies) and puts them into the model's modules.
3. free:    `free(i)` puts placeholders back and gives the buffer to the next unit, unless the stage keeps weights
            whole.

At ZeRO stages 0-2 whole buffers live from step to step, chunks' weights are views of them, and `refresh(i)` fills one
anew after its chunks were updated. Stage 3 has the same calls with shorter lives; world size 1 has the same path.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_empire import progress
from mlx_empire.comm.buffers import DTYPES, empty_rows, host_view
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.evaluations import Evaluations
from mlx_empire.engine.spares import Spares
from mlx_empire.model.spec import BLOCK, TensorSpec
from mlx_empire.plan.shards import Chunk, Placement, Segment, ShardPlan, Unit


@dataclass
class LiveChunk:
    """A chunk of this rank: `weights` (rows, 64) in the segment's dtype and the optimizer's arrays by name."""

    spec: Chunk
    weights: mx.array
    state: dict[str, mx.array] = field(default_factory=dict)


@dataclass(frozen=True)
class _Binding:
    """Where a tensor lives in the model: `container[key]`."""

    container: Any
    key: Any
    placement: Placement


class ShardStore:
    """This rank's shards of one model, and the whole units that are at hand."""

    def __init__(self, plan: ShardPlan, model: nn.Module, comm: Communicator, thread: CommThread) -> None:
        self.plan, self._comm, self._thread = plan, comm, thread
        self.hold: Callable[[int], None] = lambda unit: None  # called before a unit's chunks are updated
        self.evaluate = Evaluations()
        self.chunks: list[list[list[LiveChunk]]] = [[[] for _ in u.segments] for u in plan.units]
        self.loads: list[tuple[int, float, float]] = []  # unit, beginning and end by `time.perf_counter`
        self._whole: dict[int, list[mx.array]] = {}
        self._spares = Spares()
        self._pending: dict[int, Future[None]] = {}
        self._bound: dict[int, list[mx.array]] = {}
        self._bindings = [[[_locate(model, p) for p in s.placements] for s in u.segments] for u in plan.units]
        for unit in plan.units:
            self._unbind(unit)

    @property
    def keeps_whole(self) -> bool:
        """True where weights stay whole between steps (stages 0-2)."""
        return self.plan.zero_stage < 3

    # ---- filling, once

    def load(self, index: int, tensors: Iterable[tuple[TensorSpec, mx.array]]) -> None:
        """Fill unit `index` from its tensors, one at a time, keeping only what this rank keeps."""
        unit = self.plan.units[index]
        with self.loading(unit):
            buffers, views, starts = self.landing(unit)
            for spec, array in tensors:
                progress.advance()
                _, s, placement = self.plan.tensors[spec.name]
                segment = unit.segments[s]
                flat = host_view(array.astype(DTYPES[segment.dtype]))
                a = max(placement.start, starts[s])
                b = min(placement.start + spec.size, starts[s] + views[s].size)
                if a < b:
                    views[s][a - starts[s] : b - starts[s]] = flat[a - placement.start : b - placement.start]
            self.landed(unit, buffers)

    @contextmanager
    def loading(self, unit: Unit) -> Iterator[None]:
        """Within it `unit` is filled from files, here or by another rank; noted in `loads`."""
        start = time.perf_counter()
        yield
        self.loads.append((unit.index, start, time.perf_counter()))

    def landing(self, unit: Unit) -> tuple[list[mx.array], list[np.ndarray], list[int]]:
        """Zeroed buffers for what this rank keeps of `unit`, their numpy views and first elements, by segment."""
        spans = [self.plan.weights_interval(s, self._comm.rank) for s in unit.segments]
        buffers = empty_rows([(b - a, s.dtype) for s, (a, b) in zip(unit.segments, spans, strict=True)])
        views = [host_view(buffer) for buffer in buffers]
        for view in views:
            view[:] = 0  # gaps between tensors stay zero for good
        return buffers, views, [a for a, _ in spans]

    def landed(self, unit: Unit, buffers: list[mx.array]) -> None:
        """Take filled landing buffers over: cut them into chunks, and keep them whole where the stage does."""
        for s, segment in enumerate(unit.segments):
            first, _ = self.plan.weights_interval(segment, self._comm.rank)
            self.chunks[unit.index][s] = list(self._cut(segment, buffers[s], first // BLOCK))
        if self.keeps_whole:
            self._whole[unit.index] = buffers

    def _cut(self, segment: Segment, buffer: mx.array, first_row: int) -> Iterator[LiveChunk]:
        for chunk in segment.chunks(*self.plan.state_interval(segment, self._comm.rank)):
            a = chunk.start_row - first_row
            weights = buffer[a : a + chunk.rows]
            mx.eval(weights)
            if (
                not self.keeps_whole and segment.kind != "frozen"
            ):  # an update in place would keep the whole buffer
                (own,) = empty_rows([(weights.size, segment.dtype)])
                host_view(own)[:] = host_view(weights)
                weights = own
            yield LiveChunk(chunk, weights)

    # ---- whole units

    def gather(self, index: int) -> None:
        """Start to gather unit `index` on the communication thread, unless it is whole or on its way."""
        if index in self._whole:
            return
        self._start_gather(index, "gather")

    def refresh(self, index: int) -> None:
        """After an update: start to fill a whole unit that stays whole (stages 0-2) with its new weights, in place."""
        assert self.keeps_whole
        self._start_gather(index, "renew")

    def _start_gather(self, index: int, what: str) -> None:
        """Find buffers, where the unit has none, and queue the exchange; frozen weights are never renewed."""
        segments = self.plan.units[index].segments
        mark = None
        if index not in self._whole:
            self._whole[index], mark = self._spares.take([(s.size, s.dtype) for s in segments])
        jobs = []
        for s, segment in enumerate(segments):
            if what == "gather" or segment.kind != "frozen":
                own = [(c.spec.start_row * BLOCK, c.weights) for c in self.chunks[index][s]]
                mx.async_eval([w for _, w in own])  # type: ignore[no-untyped-call]  # what is lazy, by this thread
                jobs.append((self._whole[index][s], own, segment.edges))
        self._pending[index] = self._thread.submit(self._exchange, mark, jobs, name=(what, index))

    def _exchange(
        self,
        mark: mx.array | None,
        jobs: list[tuple[mx.array, list[tuple[int, mx.array]], tuple[int, ...]]],
    ) -> None:
        """On the communication thread: copy this rank's chunks into the buffers and all-gather the rest."""
        if mark is not None:
            host_view(mark)
        for buffer, own, edges in jobs:
            view = host_view(buffer)
            for start, weights in own:
                values = host_view(weights)
                view[start : start + values.size] = values
            if self.plan.zero_stage > 0:
                self._comm.all_gather(view, edges)

    def bind(self, index: int) -> list[mx.array]:
        """Wait for unit `index`, put its tensors into the model and return the trainable ones, segment by segment.

        Small tensors, fp32 in their segment, are bound in the dtype they compute in. All are lazy views: they are
        evaluated with what first uses them.
        """
        self.gather(index)
        self._settle(index)
        progress.advance()
        trainable = []
        for s, segment in enumerate(self.plan.units[index].segments):
            buffer = self._whole[index][s]
            for binding in self._bindings[index][s]:
                tensor = binding.placement.tensor
                array = _view(buffer, binding.placement).astype(DTYPES[tensor.dtype])
                binding.container[binding.key] = array
                if segment.kind != "frozen":
                    trainable.append(array)
        self._bound[index] = trainable
        return trainable

    def bound(self, index: int) -> list[mx.array]:
        """What `bind` returned for a unit that has not been released since."""
        return self._bound[index]

    def whole(self, index: int) -> list[mx.array]:
        """The whole buffers of a unit that is at hand, segment by segment."""
        self._settle(index)
        return self._whole[index]

    def tensors(self, index: int) -> dict[str, mx.array]:
        """All tensors of a unit that is bound, by name, in the dtype they compute in."""
        bindings = (b for segment in self._bindings[index] for b in segment)
        return {b.placement.tensor.name: b.container[b.key] for b in bindings}

    def rebind(self, index: int, arrays: Iterable[mx.array]) -> None:
        """Put `arrays`, ordered as `bind` returns them, into the model: tracers, perturbed tensors, or back."""
        values = iter(arrays)
        for s, segment in enumerate(self.plan.units[index].segments):
            if segment.kind != "frozen":
                for binding in self._bindings[index][s]:
                    binding.container[binding.key] = next(values)

    def all_bound(self, index: int) -> list[mx.array]:
        """Every tensor of a unit that is bound, frozen ones too, segment by segment, in the dtype it computes in."""
        return [b.container[b.key] for segment in self._bindings[index] for b in segment]

    def rebind_all(self, index: int, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Put `arrays`, ordered as `all_bound` returns them, into the model; returns those of trained tensors."""
        values, trained = iter(arrays), []
        for s, segment in enumerate(self.plan.units[index].segments):
            for binding in self._bindings[index][s]:
                array = binding.container[binding.key] = next(values)
                if segment.kind != "frozen":
                    trained.append(array)
        return trained

    def layout(self, index: int) -> tuple[tuple[str, bool], ...]:
        """A unit's tensors as `all_bound` orders them: their names within the unit, and whether they train."""
        unit = self.plan.units[index]
        return tuple(
            (p.tensor.name.removeprefix(unit.name), segment.kind != "frozen")
            for segment in unit.segments
            for p in segment.placements
        )

    def places(self, index: int) -> set[tuple[int, Any]]:
        """Where a unit's tensors live in the model: (id of the container, key)."""
        return {(id(b.container), b.key) for segment in self._bindings[index] for b in segment}

    def free(self, index: int) -> None:
        """The unit is not needed for now: placeholders in the model, and at stage 3 its buffer goes."""
        self._settle(index)
        self._bound.pop(index, None)
        self._unbind(self.plan.units[index])
        if not self.keeps_whole and index in self._whole:
            self._spares.give(self._whole.pop(index), self.evaluate.mark())

    def drop_spares(self) -> None:
        """After more units were whole at once than a step needs: keep no buffers for the next ones."""
        self._spares.drop()

    def adopt_views(self, index: int) -> None:
        """After `refresh`: let the chunks' weights be views of the new whole buffer, so nothing is held twice."""
        self._settle(index)
        renewed = []
        for s, segment in enumerate(self.plan.units[index].segments):
            if segment.kind == "frozen":  # its buffer stayed
                continue
            buffer = self._whole[index][s]
            for chunk in self.chunks[index][s]:
                chunk.weights = buffer[chunk.spec.start_row : chunk.spec.start_row + chunk.spec.rows]
                renewed.append(chunk.weights)
        self.evaluate(renewed)

    def put(self, values: Mapping[str, mx.array]) -> None:
        """Replace tensors between steps, where weights stay whole (stages 0-2), and nothing is bound."""
        assert self.keeps_whole
        touched = set()
        for name, array in values.items():
            index, s, placement = self.plan.tensors[name]
            view = host_view(self._whole[index][s])
            view[placement.start : placement.start + placement.tensor.size] = host_view(
                mx.contiguous(array.astype(DTYPES[self.plan.units[index].segments[s].dtype]))
            )
            touched.add(index)
        for index in touched:
            self.adopt_views(index)

    def trainable(self, index: int) -> list[tuple[int, Placement]]:
        """(segment index, placement) of the unit's trainable tensors, in the order of `bind`."""
        segments = self.plan.units[index].segments
        return [(s, p) for s, seg in enumerate(segments) if seg.kind != "frozen" for p in seg.placements]

    def wait_for(self, mark: mx.array) -> None:
        """Return when an array is there that was handed over; the communication thread waits for it."""
        self._thread.wait(self._thread.submit(host_view, mark), "update")

    def _settle(self, index: int) -> None:
        pending = self._pending.pop(index, None)
        if pending is not None:
            self._thread.wait(pending, "renew" if self.keeps_whole else "gather")

    def _unbind(self, unit: Unit) -> None:
        for bindings in self._bindings[unit.index]:
            for binding in bindings:
                tensor = binding.placement.tensor
                # Lazy and never evaluated: code that reads a shape or dtype still can, and nothing is allocated.
                binding.container[binding.key] = mx.zeros(tensor.shape, DTYPES[tensor.dtype])


def _view(buffer: mx.array, placement: Placement) -> mx.array:
    tensor = placement.tensor
    first = placement.start // BLOCK
    rows = buffer[first : first + tensor.padded_size // BLOCK]
    if tensor.size == tensor.padded_size:
        return rows.reshape(tensor.shape)
    return rows.reshape(-1)[: tensor.size].reshape(tensor.shape)


def _locate(model: nn.Module, placement: Placement) -> _Binding:
    """Find the container (module, dict or list) and key of a parameter by its dotted path."""
    *path, last = placement.tensor.name.split(".")
    container: Any = model
    for part in path:
        container = container[int(part)] if isinstance(container, list) else container[part]
    return _Binding(container, int(last) if isinstance(container, list) else last, placement)
