"""The end of a step: global norm over all shards, the check that it is finite, clipping, and the optimizer.

Norm and update go over the same flat shards, so nothing is ever put together: each rank updates the elements whose
state it holds, chunk by chunk, and where weights stay whole a unit's new weights are gathered while the next unit is
updated.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_empire import phases
from mlx_empire.comm.protocol import Communicator
from mlx_empire.engine.diagnose import GradientError, bad_totals
from mlx_empire.engine.gradients import GradientStore
from mlx_empire.engine.store import LiveChunk, ShardStore
from mlx_empire.optim.decay import decays
from mlx_empire.optim.norm import NormLayout, NormPartials, block_sums, clip_scale
from mlx_empire.optim.protocol import ChunkId, ShardOptimizer, StepScalars
from mlx_empire.plan.model import BLOCK
from mlx_empire.plan.shards import SHARED_ELEMENTS, Segment


class Updater:
    """Applies finished gradient totals to this rank's shards."""

    def __init__(
        self,
        store: ShardStore,
        sums: GradientStore,
        optimizer: ShardOptimizer,
        comm: Communicator,
        clip_norm: float | None,
    ) -> None:
        self.hold: Callable[[int], None] = lambda unit: None  # called before a unit's arrays are replaced
        self._store, self._sums, self._optimizer, self._comm = store, sums, optimizer, comm
        self._clip_norm = clip_norm
        self._layout = NormLayout.of(store.plan)
        self._decays = {
            name: decays(name, placement.tensor.shape)
            for name, (_, _, placement) in store.plan.tensors.items()
        }

    def init_states(self) -> None:
        """Make the optimizer's state for every chunk that this rank updates."""
        for unit in self._store.plan.units:
            for segment, chunks in zip(unit.segments, self._store.chunks[unit.index], strict=True):
                if segment.kind == "frozen":
                    continue
                for chunk in chunks:
                    chunk.state = self._optimizer.init(chunk.weights, quantised=segment.kind == "trainable")
                    mx.eval(chunk.state)

    def apply(self, step: int, learning_rate: float, norm: float | None = None) -> float:
        """Clip, update and renew all weights; returns the global gradient norm before clipping. Collective.

        norm: what `norm` gave, if it was asked already. GradientError as there.
        """
        norm = self.norm() if norm is None else norm
        scalars = StepScalars(step, learning_rate, clip_scale(norm, self._clip_norm))
        self.renew(lambda name: scalars)
        return norm

    def renew(self, scalars_of: Callable[[str], StepScalars]) -> None:
        """Update all weights, each tensor by what `scalars_of` says for its name; drop the gradients. Collective."""
        renewing: int | None = None
        for unit in self._store.plan.units:
            totals = self._sums.totals.pop(unit.index, [])
            trained = [s for s, segment in enumerate(unit.segments) if segment.kind != "frozen"]
            if trained:
                self.hold(unit.index)
            for s, total in zip(trained, totals, strict=True):
                self._update_segment(unit.segments[s], self._store.chunks[unit.index][s], total, scalars_of)
            del totals
            if self._store.keeps_whole and trained:
                self._store.refresh(unit.index)
                if renewing is not None:
                    self._store.adopt_views(renewing)
                renewing = unit.index
        if renewing is not None:
            self._store.adopt_views(renewing)
        self._sums.clear()

    def _update_segment(
        self,
        segment: Segment,
        chunks: list[LiveChunk],
        total: mx.array,
        scalars_of: Callable[[str], StepScalars],
    ) -> None:
        """Update the chunks of one segment from its gradient `total` (rows, 64) over this rank's state interval."""
        first = self._store.plan.state_interval(segment, self._comm.rank)[0] // BLOCK
        # Large chunks are evaluated alone: MLX frees what several have in between at moments of its own choosing.
        waiting: list[LiveChunk] = []
        elements = 0
        for chunk in chunks:
            if waiting and elements + chunk.spec.rows * BLOCK > SHARED_ELEMENTS:
                mx.eval([(c.weights, c.state) for c in waiting])
                waiting, elements = [], 0
            a = chunk.spec.start_row - first
            gradient = total[a : a + chunk.spec.rows]
            identity = ChunkId(chunk.spec.tensor, chunk.spec.first_row, self._decays[chunk.spec.name])
            chunk.weights, chunk.state = self._optimizer.update(
                chunk.weights, chunk.state, gradient, identity, scalars_of(chunk.spec.name)
            )
            waiting.append(chunk)
            elements += chunk.spec.rows * BLOCK
        mx.eval([(c.weights, c.state) for c in waiting])

    def norm(self) -> float:
        """The norm of all gradients: every rank counts its own interval, also where it holds more. Collective.

        GradientError on all ranks, naming the tensors, when it is not finite. Nothing is changed.
        """
        phases.reach("optimizer")
        partials = NormPartials(self._layout, self._comm.rank)
        segments = [
            (unit.index, s)
            for unit in self._store.plan.units
            for s, segment in enumerate(seg for seg in unit.segments if seg.kind != "frozen")
        ]
        for index, (unit, s) in enumerate(segments):
            a, b = self._layout.interval(index, self._comm.rank)
            total = self._sums.totals[unit][s]
            own = total[a:b] if self._store.plan.zero_stage == 0 else total
            partials.add(index, block_sums(own))
        sums, blocks = partials.packed()
        packed = list(zip(self._comm.gather_arrays(sums), self._comm.gather_arrays(blocks), strict=True))
        norm = self._layout.combine(packed)
        if norm.bad_segments:
            suspects = [segments[i] for i in norm.bad_segments]
            names = bad_totals(self._store, self._sums.totals, suspects, self._comm)
            raise GradientError(names or [self._store.plan.units[suspects[0][0]].name])
        return norm.value
