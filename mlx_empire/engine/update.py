"""The end of a step: global norm over all shards, the check that it is finite, clipping, and the optimizer.

Norm and update go over the same flat shards, so nothing is ever put together: each rank updates the elements whose
state it holds, chunk by chunk. The order of units, and when their new weights are gathered, is the schedule's.

The optimizer in the backward (gradient release) updates every unit as soon as its gradient is complete, which is then
not kept.

A step is layer-major, so a unit's gradient is complete after one visit, however many micro-batches there are. The
update runs on the main thread when the unit's reduction is done, while nothing else of the backward computes.

Clipping. The step's norm is known only at its end, so a unit is clipped by the largest of what is known:

    n = max(global norm of the last step, norm of this step's units so far, this one included)
    scale = min(1, clip_norm / n)

in the fixed order of the backward: last layer first, the root last. The first step has only the second part. A leap
is thus held back within its own step: no unit moves as if its own gradient were longer than clip_norm. All numbers
are summed in fixed trees, so every rank and any number of ranks gets the same. `last_norm` belongs into a checkpoint.

Numbers that are not finite. A unit's gradient is checked before the unit is updated, on all ranks. Units that were
updated earlier in the step cannot be undone, and the error says how many: a run goes on from its last checkpoint.
A loss that is not finite makes the last layer's gradient so, which is the first one: then nothing was changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from math import sqrt
from typing import Any

import mlx.core as mx

from mlx_empire import progress
from mlx_empire.comm.protocol import Communicator
from mlx_empire.engine.gradients import GradientStore
from mlx_empire.engine.numerics import GradientError, bad_totals
from mlx_empire.engine.statistics import UpdateStatistics
from mlx_empire.engine.store import LiveChunk, ShardStore
from mlx_empire.model.spec import BLOCK
from mlx_empire.optim.norm import PIECE_ROWS, NormLayout, NormPartials, clip_scale, on_host, piece_sums
from mlx_empire.optim.protocol import ChunkId, ShardOptimizer, StepScalars, decays
from mlx_empire.plan.shards import SHARED_ELEMENTS, Segment, Unit

# Of a unit whose totals are complete: by what each of its tensors, by name, is updated.
ByUnit = Callable[[int], Callable[[str], StepScalars]]


class Updater:
    """Applies finished gradient totals to this rank's shards."""

    def __init__(
        self,
        store: ShardStore,
        sums: GradientStore,
        optimizer: ShardOptimizer,
        comm: Communicator,
        clip_norm: float | None,
        statistics: UpdateStatistics | None = None,
    ) -> None:
        self._store, self._sums, self._optimizer, self._comm = store, sums, optimizer, comm
        self._clip_norm, self.statistics = clip_norm, statistics
        self._scalars_of: Callable[[str], StepScalars] = _not_begun
        self._handed_over: mx.array | None = None  # is there once the last unit's update is done
        self._layout = NormLayout.of(store.plan)
        self._decays = {
            name: decays(name, placement.tensor.shape)
            for name, (_, _, placement) in store.plan.tensors.items()
        }

    @property
    def changed(self) -> str:
        """What an error that comes before or in the update says of the weights."""
        return "no weight was changed"

    def init_states(self) -> None:
        """Make the optimizer's state for every chunk that this rank updates."""
        for unit in self._store.plan.units:
            for segment, chunks in zip(unit.segments, self._store.chunks[unit.index], strict=True):
                if segment.kind == "frozen":
                    continue
                for chunk in chunks:
                    chunk.state = self._optimizer.init(chunk.weights, quantised=segment.kind == "trainable")
                    mx.eval(chunk.state)

    def begin(self, scalars_of: Callable[[str], StepScalars]) -> None:
        """The next updates are each tensor's by what `scalars_of` says for its name."""
        self._scalars_of = scalars_of

    def clipped(self, step: int, learning_rate: float, norm: float, scale: float = 1.0) -> StepScalars:
        """The scalars of a step whose gradients have this `norm`, and whose totals are `scale` times as large."""
        return StepScalars(step, learning_rate, clip_scale(norm, self._clip_norm) / scale)

    def norm_of(self, index: int) -> None:
        """The check of one unit where it is updated in the backward; see `OptimizerInBackward`."""
        raise NotImplementedError("units are updated at the end of the step")

    def update(self, index: int) -> None:
        """Update a unit from its totals, which go.

        Running ahead, wait for the unit before, which holds its old state; where weights stay whole, `adopt` does.
        """
        unit = self._store.plan.units[index]
        totals = self._sums.totals[index]
        trained = [s for s, segment in enumerate(unit.segments) if segment.kind != "frozen"]
        self._store.hold(index)
        for s, total in zip(trained, totals, strict=True):
            chunks = self._store.chunks[index][s]
            self._update_segment(unit.segments[s], chunks, total, self._scalars_of)
        self._sums.drop(index)
        if not self._store.keeps_whole:
            before, self._handed_over = self._handed_over, self._store.evaluate.mark()
            if before is not None:
                self._store.wait_for(before)

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
                self._store.evaluate([(c.weights, c.state) for c in waiting])
                waiting, elements = [], 0
            a = chunk.spec.start_row - first
            gradient = total[a : a + chunk.spec.rows]
            scalars = scalars_of(chunk.spec.name)
            if self.statistics is not None:
                self.statistics.see(chunk, gradient, scalars)
            identity = ChunkId(chunk.spec.tensor, chunk.spec.first_row, self._decays[chunk.spec.name])
            chunk.weights, chunk.state = self._optimizer.update(
                chunk.weights, chunk.state, gradient, identity, scalars
            )
            waiting.append(chunk)
            elements += chunk.spec.rows * BLOCK
        self._store.evaluate([(c.weights, c.state) for c in waiting])

    def norm(self) -> float:
        """The norm of all gradients: every rank counts its own interval, also where it holds more. Collective.

        GradientError on all ranks, naming the tensors, when it is not finite. Nothing is changed.
        """
        progress.reach("optimizer")
        return self._norm_of(self._layout, list(self._store.plan.units))

    def _norm_of(self, layout: NormLayout, units: list[Unit]) -> float:
        """The norm over the trained segments of `units`, which are those of `layout`. As `norm`."""
        partials = NormPartials(layout, self._comm.rank)
        segments = [
            (unit.index, s) for unit in units for s in range(len(self._sums.totals.get(unit.index, [])))
        ]
        spans = [layout.interval(i, self._comm.rank) for i in range(len(segments))]
        rows = Counter[int]()  # by unit
        pieces: list[list[mx.array]] = []  # of each segment's sums

        def made() -> Iterator[mx.array]:
            for (index, s), (a, b) in zip(segments, spans, strict=True):
                total = self._sums.totals[index][s]
                pieces.append(piece_sums(total[a:b] if self._store.plan.zero_stage == 0 else total))
                yield from pieces[-1]

        for (index, _), (a, b) in zip(segments, spans, strict=True):
            rows[index] += b - a
        # As many at once as the largest unit has: MLX would hold the squares of all.
        most = min(max(rows.values(), default=0), PIECE_ROWS)
        self._store.evaluate.in_groups(made(), lambda piece: piece.shape[0], most)
        mx.eval(pieces)
        for s, parts in enumerate(pieces):
            partials.add(s, on_host(parts))
        sums, blocks = partials.packed()
        packed = list(zip(self._comm.gather_arrays(sums), self._comm.gather_arrays(blocks), strict=True))
        norm = layout.combine(packed)
        if norm.bad_segments:
            suspects = [segments[i] for i in norm.bad_segments]
            names = bad_totals(self._store, self._sums.totals, suspects, self._comm)
            raise GradientError(names or [self._store.plan.units[suspects[0][0]].name])
        return norm.value


def _not_begun(name: str) -> StepScalars:
    raise AssertionError(f"{name}: an update before `begin`")


class OptimizerInBackward(Updater):
    """Applies a unit's finished total at once: `norm_of` and `update` are played in the backward, once a unit."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.last_norm = 0.0
        self.updated = 0  # units, in this step
        self._step: tuple[int, float] = (0, 0.0)
        self._scale = 1.0
        self._squares = 0.0
        self.by_unit: ByUnit | None = None
        units = self._store.plan.units
        self._layouts = {unit.index: NormLayout.of_units([unit]) for unit in units}

    def begin_step(self, step: int, learning_rate: float, scale: float = 1.0) -> None:
        """The backward of `step` begins, whose totals are `scale` times as large as the gradients."""
        self._step, self._squares, self.updated = (step, learning_rate), 0.0, 0
        self._scale = scale

    def norm_of(self, index: int) -> None:
        """The unit's totals are complete on all ranks: check, and clip its update. Collective. GradientError.

        With `by_unit` that says by what its tensors are updated, in the place of one norm for all.
        """
        progress.reach("optimizer")
        if self.by_unit is not None:
            self.begin(self.by_unit(index))
            return
        unit = self._store.plan.units[index]
        self._squares += (self._norm_of(self._layouts[index], [unit]) / self._scale) ** 2
        scalars = self.clipped(*self._step, max(self.last_norm, sqrt(self._squares)), self._scale)
        self.begin(lambda name: scalars)

    def update(self, index: int) -> None:
        """As `Updater.update`, and counted."""
        super().update(index)
        self.updated += 1

    def end(self) -> float:
        """The backward has ended and every unit was updated; returns the step's global norm before clipping."""
        self.last_norm = sqrt(self._squares)
        return self.last_norm

    @property
    def changed(self) -> str:
        """What an error says of the weights."""
        if not self.updated:
            return super().changed
        whole = sum(bool(layout.edges) for layout in self._layouts.values())
        return f"{self.updated} of {whole} units were updated already (optimizer.in_backward): go on from a checkpoint"
