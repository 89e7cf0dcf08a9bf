"""One training step on this rank: plays the list of actions of `plan.schedule` on arrays, a short method for each kind.

What is computed is in `passes`, what comes and goes whole in `store`, sums and their reduction in `gradients`, the
update in `update`. Collectives only ever see evaluated arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx
import numpy as np

from mlx_empire import progress
from mlx_empire.data.batches import MicroBatch
from mlx_empire.engine.gradients import EmbeddingSum, GradientStore, MicroBatchSum
from mlx_empire.engine.input_file import InputFile
from mlx_empire.engine.layer_calls import Running
from mlx_empire.engine.loss import of_all_rows
from mlx_empire.engine.passes import Passes
from mlx_empire.engine.store import ShardStore
from mlx_empire.engine.update import Updater
from mlx_empire.plan.actions import ALL_UNITS, Action, Reader, StepShape
from mlx_empire.plan.schedule import evaluation, gradients

if TYPE_CHECKING:
    from mlx_empire.engine.trace import StepTrace

Measured = TypeVar("Measured")


class StreamedStep(Reader):
    """Runs steps and evaluations of `shape` (its cells follow from the micro-batches that are given).

    `updater` may be left out where only gradients are wanted, `inputs` where no layer's input goes to a file. `norm`:
    that of the last `norm` action.
    """

    def __init__(
        self,
        passes: Passes,
        store: ShardStore,
        sums: GradientStore,
        shape: StepShape,
        updater: Updater | None = None,
        inputs: InputFile | None = None,
    ) -> None:
        self._inputs = inputs
        self._passes, self._store, self._sums, self._updater = passes, store, sums, updater
        self._shape = shape
        self._batches: list[MicroBatch] = []
        self._running: dict[int, Running] = {}
        self._losses: list[np.ndarray] = []
        self._cells: dict[tuple[int, int], MicroBatchSum] = {}  # by unit and round
        self._embeds: dict[int, EmbeddingSum] = {}  # the embedding's part of the root, by round
        self._weights: dict[int, list[mx.array]] = {}  # of the units that are bound
        self._total = mx.array(1.0)
        self._measure: Callable[[Running], Any] | None = None
        self._measured: list[Any] = []
        self.norm_value = 0.0
        self.trace: StepTrace | None = None
        self.before_micro: Callable[[int], None] | None = None  # called before a step does something with it

    def play(self, actions: Iterable[Action]) -> None:
        """As `Reader.play`; with a trace every action is noted."""
        evaluate = self._store.evaluate
        try:
            for action in actions:
                evaluate.waits = self._shape.waits(action)
                if self.before_micro is not None and action.micro >= 0 and self._measure is None:
                    self.before_micro(action.micro)
                with nullcontext() if self.trace is None else self.trace.action(action):
                    super().play((action,))
        finally:
            evaluate.waits = True

    def gradients(
        self,
        rounds: Sequence[Sequence[MicroBatch]],
        total_tokens: int,
        *,
        update: bool = False,
        scale: float = 1.0,
    ) -> list[np.ndarray]:
        """By micro-batch of this rank its rows' losses (already divided by the global count); totals are complete.

        `rounds` holds this rank's cells; a round without a cell is an empty list and still joins the collectives.
        `update`: with `in_backward` also update units as they are complete. `scale`: a power of two, by which totals
        are larger than the gradients.
        """
        if not any(rounds):
            progress.reach("collectives")
        self._begin([micro for one in rounds for micro in one], total_tokens / scale)
        shape = replace(self._shape, cells=tuple(len(one) for one in rounds))
        self.play(gradients(shape, update=update))
        return self._losses if scale == 1.0 else [rows / np.float32(scale) for rows in self._losses]

    def losses(self, batches: Sequence[MicroBatch], total_tokens: int) -> list[float]:
        """Forward only, for evaluation: the loss of each micro-batch, divided by `total_tokens`."""
        by_row = self._evaluate(batches, total_tokens, lambda r: self._passes.loss(r, self._total))
        return [of_all_rows(rows) for rows in by_row]

    def scores(self, batches: Sequence[MicroBatch]) -> list[np.ndarray]:
        """Forward only: by micro-batch what `head_scores` says of each row."""
        return [np.array(scores) for scores in self._evaluate(batches, 1, self._passes.scores)]

    def readings(self, batches: Sequence[MicroBatch]) -> list[np.ndarray]:
        """Forward only: by micro-batch the log-probability of every target, (rows, width) float32."""
        return [np.array(found) for found in self._evaluate(batches, 1, self._passes.readings)]

    def likeliest(
        self, batches: Sequence[MicroBatch], columns: int, top: int, temperature: float
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Forward only: by micro-batch what `head_likeliest` says of its targets that count."""
        return self._evaluate(batches, 1, lambda r: self._passes.likeliest(r, columns, top, temperature))

    def _evaluate(
        self, batches: Sequence[MicroBatch], total_tokens: int, measure: Callable[[Running], Measured]
    ) -> list[Measured]:
        self._begin(batches, total_tokens)
        self._measure, self._measured = measure, []
        with self._passes.evaluating():
            self.play(evaluation(replace(self._shape, cells=(len(batches),))))
        self._measure = None
        return self._measured

    def _begin(self, batches: Sequence[MicroBatch], total_tokens: float) -> None:
        self._passes.begin()
        self._batches, self._running, self._cells, self._embeds = list(batches), {}, {}, {}
        self._losses = []
        if self._inputs is not None:
            self._inputs.begin()
        self._total = mx.array(float(total_tokens), mx.float32)

    # ---- weights

    def gather(self, action: Action) -> None:
        self._store.gather(action.unit)

    def bind(self, action: Action) -> None:
        self._weights[action.unit] = self._store.bind(action.unit)

    def free(self, action: Action) -> None:
        self._weights.pop(action.unit, None)
        self._store.free(action.unit)
        if action.unit == 0:  # nothing of these micro-batches is computed any more: hidden states go
            self._losses += [np.array(r.loss) for r in self._running.values() if r.loss is not None]
            self._running = {}

    # ---- micro-batches

    def capture(self, action: Action) -> None:
        if self._measure is None and not self._running:
            progress.reach("forward")  # of every wave
        self._running[action.micro] = self._passes.capture(action.micro, self._batches[action.micro])

    def forward(self, action: Action) -> None:
        stays = action.unit >= self._shape.lowest and action.unit not in self._shape.offloaded
        keep = self._measure is None and stays
        r, products = self._running[action.micro], action.products
        self._passes.forward(action.unit - 1, r, keep_input=keep, products=products)

    stash = forward

    def offload(self, action: Action) -> None:
        assert self._inputs is not None
        self._inputs.write(action.unit, action.micro, self._running[action.micro].hidden)

    def evict(self, action: Action) -> None:
        assert self._inputs is not None
        self._inputs.written(action.unit, action.micro)

    def prefetch(self, action: Action) -> None:
        assert self._inputs is not None
        self._inputs.read(action.unit, action.micro)

    def fetch(self, action: Action) -> None:
        assert self._inputs is not None
        found = self._inputs.fetched(action.unit, action.micro)
        self._running[action.micro].inputs[action.unit - 1] = found

    def score(self, action: Action) -> None:
        assert self._measure is not None
        self._measured.append(self._measure(self._running[action.micro]))

    def head(self, action: Action) -> None:
        if action.micro == min(self._running):
            progress.reach("backward")
            self._store.evaluate.finish()
        r, boundary = self._running[action.micro], self._shape.boundary
        weights = {u - 1: w for u, w in self._weights.items() if u > boundary}
        onward = self._needed(boundary + 1)
        gradients, by_layer = self._passes.head(r, weights, self._total, onward=onward)
        cells = [self._cell(0, action.round), *(self._cell(i + 1, action.round) for i in by_layer)]
        for cell, own in zip(cells, (gradients, *by_layer.values()), strict=True):
            cell.add(own)
        del gradients, by_layer, own
        mx.eval(r.loss, r.hidden, [cell.arrays for cell in cells])
        self._store.rebind(0, self._store.bound(0))

    def backward(self, action: Action) -> None:
        r, cell = self._running[action.micro], self._cell(action.unit, action.round)
        onward = self._needed(action.unit)
        cell.add(self._passes.backward(action.unit - 1, r, self._weights[action.unit], onward=onward))
        with self._passes.traces.evaluated():
            self._store.evaluate(r.hidden, cell.arrays)

    reuse = backward

    def embed(self, action: Action) -> None:
        if self._passes.embed_tensors:
            for earlier in self._embeds.values():  # one micro-batch's gradient is in flight at a time
                earlier.settle()
            cell = self._embeds.setdefault(action.round, EmbeddingSum())
            self._passes.embed(self._running[action.micro], cell)
            self._store.rebind(0, self._store.bound(0))

    # ---- sums

    def keep(self, action: Action) -> None:
        cell = self._complete_cell(action)
        if cell is not None:
            self._sums.round_off(action.unit, cell)
            self._cells[action.unit, action.round] = cell

    def reduce(self, action: Action) -> None:
        kept = self._shape.zero_stage == 1
        place = action.unit, action.round
        cell = self._cells.pop(place, None) if kept else self._complete_cell(action)
        self._sums.reduce(action.unit, action.round, cell)

    def replicate(self, action: Action) -> None:
        self._sums.replicate(action.unit)

    def settle(self, action: Action) -> None:
        self._sums.settle(action.unit, last=action.round == self._sums.last_round)

    def _cell(self, unit: int, round: int) -> MicroBatchSum:
        return self._cells.setdefault((unit, round), MicroBatchSum())

    def _complete_cell(self, action: Action) -> MicroBatchSum | None:
        """A round's sum of a unit, which is forgotten here; None where this rank has no cell."""
        cell = self._cells.pop((action.unit, action.round), None)
        if action.unit == 0 and cell is not None:
            self._store.evaluate.finish()
            cell = self._passes.whole_root(cell, self._embeds.pop(action.round, EmbeddingSum()))
            mx.eval(cell.arrays)
        if cell is not None:
            self._sums.inspect(action.unit, cell)
        return cell

    def _needed(self, unit: int) -> bool:
        """Whether the cotangent of a layer's input is: a layer below trains, or the embedding."""
        return unit > self._shape.lowest or bool(self._passes.embed_tensors)

    # ---- update

    def norm(self, action: Action) -> None:
        assert self._updater is not None
        if action.unit == ALL_UNITS:
            self.norm_value = self._updater.norm()
        else:
            self._updater.norm_of(action.unit)

    def update(self, action: Action) -> None:
        assert self._updater is not None
        self._updater.update(action.unit)

    def renew(self, action: Action) -> None:
        self._store.refresh(action.unit)

    def adopt(self, action: Action) -> None:
        self._store.adopt_views(action.unit)


def in_rounds(micro_batches: Sequence[MicroBatch], members: Sequence[range]) -> Iterator[list[MicroBatch]]:
    """A rank's micro-batches, given in order, divided into its cells."""
    values = iter(micro_batches)
    for cell in members:
        yield [next(values) for _ in cell]
