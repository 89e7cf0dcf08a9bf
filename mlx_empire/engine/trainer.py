"""A rank's training steps: streamed gradients, global norm and clipping, the update, and the weights' renewal.

Built in two moves, because weights are loaded in between: the constructor lays out the store and puts slots into the
model; `prepare` asks the loaded root how it is used, refuses models that cannot be streamed, and makes the
optimizer's state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.nn as nn
import numpy as np

from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.data.batches import MicroBatch
from mlx_empire.engine.blame import gradient_error, loss_error, released_error
from mlx_empire.engine.gradients import GradientStore
from mlx_empire.engine.input_file import InputFile
from mlx_empire.engine.loss import parts_of_rows
from mlx_empire.engine.loss_scale import LossScale
from mlx_empire.engine.numerics import GradientError, SpikeWatch
from mlx_empire.engine.passes import Passes
from mlx_empire.engine.statistics import UpdateStatistics
from mlx_empire.engine.step import StreamedStep, in_rounds
from mlx_empire.engine.store import ShardStore
from mlx_empire.engine.streamable import check_packing, probe_root
from mlx_empire.engine.update import ByUnit, OptimizerInBackward, Updater
from mlx_empire.errors import UserError, on_all_ranks
from mlx_empire.model.attention.segments import Kernels
from mlx_empire.model.build import foreign
from mlx_empire.model.layers import LayerNoise, SlottedModel
from mlx_empire.model.spec import ModelSpec
from mlx_empire.model.ternary import in_full
from mlx_empire.optim.flat import FlatOptimizer
from mlx_empire.optim.protocol import StepScalars
from mlx_empire.plan.schedule import global_norm, updates
from mlx_empire.plan.shards import ShardPlan
from mlx_empire.plan.workload import Workload, chunk_tokens, step_shape

if TYPE_CHECKING:
    from mlx_empire.engine.trace import StepTrace


PARTS = "cross_entropy", "divergence"  # of a loss with a teacher


@dataclass(frozen=True)
class StepResult:
    """What all ranks know after a step; `loss` is the mean over the step's counted tokens; `parts` of it by name, where
    it mixes cross-entropy and divergence from a teacher.

    `skipped`: nothing was updated; `go_back`: and the last checkpoint is to be restored; `note`: what there is to say
    about that; `statistics`: see `UpdateStatistics`; `waited_for`: `wait_seconds` of this rank by what was waited for;
    `untraced`: a line for each class of layer of which it turned out in this step that it cannot be traced.
    """

    loss: float
    gradient_norm: float
    wait_seconds: float
    skipped: bool = False
    go_back: bool = False
    note: str | None = None
    statistics: Mapping[str, float] = field(default_factory=dict)
    waited_for: Mapping[str, float] = field(default_factory=dict)
    untraced: tuple[str, ...] = ()
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainerSettings:
    """What a recipe chooses of a step: None for no clipping, no dropout, no statistics of the optimizer's states.

    `noise_seed`: of dropout's masks. `spikes` and `loss_scale` are one run's, for they remember steps.
    """

    clip_norm: float | None = None
    noise_seed: int | None = None
    spikes: SpikeWatch = field(default_factory=lambda: SpikeWatch("off"))
    statistics_every: int | None = None
    loss_scale: LossScale = field(default_factory=LossScale)


class Trainer:
    """One rank's part of a training run; `inputs`: where the plan has layers' inputs go."""

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        plan: ShardPlan,
        work: Workload,
        comm: Communicator,
        thread: CommThread,
        optimizer: FlatOptimizer,
        settings: TrainerSettings,
        inputs: InputFile | None = None,
    ) -> None:
        self.inputs = inputs
        self.spec, self.work, self.optimizer = spec, work, optimizer
        self._comm, self._thread, self._spikes = comm, thread, settings.spikes
        self._scale = settings.loss_scale
        self.store = ShardStore(plan, model, comm, thread)
        self._slotted = SlottedModel(model, spec.name)
        self._sums = GradientStore(self.store, comm, thread, work.layout, work.gradient_dtype)
        every, seed = settings.statistics_every, settings.noise_seed
        self._statistics = None if every is None else UpdateStatistics(self.store, optimizer, comm, every)
        self._updater = (OptimizerInBackward if work.optimizer_in_backward else Updater)(
            self.store, self._sums, optimizer, comm, settings.clip_norm, self._statistics
        )
        self.noise = None if seed is None else LayerNoise(seed)
        self._passes: Passes
        self.streamed: StreamedStep
        self._told = 0  # lines of layers that cannot be traced
        self._parts: dict[str, float] = {}  # of the last loss

    def prepare(self, *, packing: bool, fresh: bool = True, together: int = 1) -> None:
        """After the weights are in: probe the model (UserError if it cannot be streamed) and make the states.

        `fresh` is False where the states are in too; `together`: daughters whose adapters stand in the model.
        """
        vocabulary = int(self.spec.text_config["vocab_size"])
        try:
            with foreign(f"{self.spec.name}: mlx-lm's model cannot be run with slots for layers", mixed=True):
                use = probe_root(self._slotted, self.store, vocabulary, together)
            if packing:
                check_packing(self._slotted, use)
        except UserError as error:  # the same model on every rank, so the same verdict
            raise on_all_ranks(error) from None
        tokens = chunk_tokens(vocabulary, frozen=not self.store.trainable(0))
        kernels = Kernels.here() if self.work.by_pattern else None
        self._passes = Passes(
            self._slotted,
            self.store,
            use.head,
            use.embed,
            tokens,
            self.noise,
            use.table,
            kernels,
            strict=self.work.strict,
            compiles=self.work.compiled,
            how=self.work.distillation,
        )
        shape = step_shape(self.store.plan, self.work, self._comm.rank)
        # The plan goes by names where nothing was scaled down; what was probed holds.
        self._shape = replace(shape, embeds=shape.embeds or bool(use.embed))
        self.streamed = StreamedStep(
            self._passes, self.store, self._sums, self._shape, self._updater, self.inputs
        )
        if fresh:
            self._updater.init_states()

    def observe(self, trace: StepTrace | None) -> None:
        """Note what the main and the communication thread do, or no longer."""
        self.streamed.trace = trace
        self._thread.observe = trace.exchange if trace is not None else None
        if self.inputs is not None:
            self.inputs.observe(self._thread.observe)

    @contextmanager
    def whole_model(self) -> Iterator[nn.Module]:
        """The model with all its weights on this rank, as mlx-lm made it, for inference. Collective in and out."""
        units = range(len(self.spec.units))
        self._sums.drop_spares()
        for index in units:
            self.store.bind(index)
        with self._slotted.whole() as model, in_full(self._passes.strength):
            yield model
        for index in units:
            self.store.free(index)
        self.store.drop_spares()

    @property
    def gradients(self) -> GradientStore:
        """This step's gradient totals, between `compute` and the update."""
        return self._sums

    def update_by_unit(self, by_unit: ByUnit) -> None:
        """Where units are updated in the backward: by what this says of each one, in the place of one norm for all."""
        assert isinstance(self._updater, OptimizerInBackward)
        self._updater.by_unit = by_unit

    def renew(self, scalars_of: Callable[[str], StepScalars]) -> None:
        """Update every tensor by what `scalars_of` says for its name; drop the gradients. Collective."""
        self._updater.begin(scalars_of)
        self.streamed.play(updates(self._shape))
        self._sums.clear()

    def compute(
        self, micro_batches: Sequence[MicroBatch], total_tokens: int, step: int = 1, *, update: bool = False
    ) -> float:
        """Forward and backward of this rank's micro-batches (in the order of its cells); the global mean loss.

        NumericsError if it is not finite, but where a smaller loss scale may be the answer.
        """
        members = self.work.layout.of_rank(self._comm.rank)
        if self.noise is not None:
            self.noise.begin(step, [j for cell in members for j in cell])
        rounds = list(in_rounds(micro_batches, members))
        by_row = self.streamed.gradients(rounds, total_tokens, update=update, scale=self._scale.value)
        loss, losses = self._mixed([parts_of_rows(rows) for rows in by_row])
        if not math.isfinite(loss) and not self._scale.may_fall:
            raise loss_error(step, loss, losses, self.store, self._comm, self._updater.changed)
        return loss

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        total_tokens: int,
        step: int,
        learning_rate: float,
        strength: float = 1.0,
    ) -> StepResult:
        """One optimizer step (counted from 1). NumericsError before any change if loss or gradient is not finite.

        `strength`: how far weights are rounded, from 0 to 1, where they are trained as ternary ones.
        With gradient release units that were complete earlier are changed by then; the error says so.
        """
        self._thread.reset()
        if self._passes.strength is not None:
            self._passes.strength.at(strength)
        if isinstance(self._updater, OptimizerInBackward):
            return self._released_step(self._updater, micro_batches, total_tokens, step, learning_rate)
        loss, norm = self._loss_and_norm(micro_batches, total_tokens, step)
        if not math.isfinite(loss + norm):
            self._sums.clear()
            return self._overflowed(loss)
        verdict = self._spikes.judge(step, loss, norm)
        if verdict.skip:
            self._sums.clear()
        else:
            # What was left out was no step to the optimizer, whose averages are corrected by how many there were.
            updates = step - self._scale.left_out
            scalars = self._updater.clipped(updates, learning_rate, norm, self._scale.value)
            self.renew(lambda name: scalars)
        self._scale.held()
        told = {"skipped": verdict.skip, "go_back": verdict.back, "note": verdict.note}
        return self._result(loss, norm, statistics=self._measured(step), **told)

    def _loss_and_norm(
        self, micro_batches: Sequence[MicroBatch], total_tokens: int, step: int
    ) -> tuple[float, float]:
        """Of the gradients, which lie in the totals. NumericsError where one is not finite, or infinity for it where a
        smaller loss scale may be the answer."""
        loss = self.compute(micro_batches, total_tokens, step)
        if not math.isfinite(loss):
            return loss, math.inf
        try:
            self.streamed.play(global_norm(self._shape))
        except GradientError as error:
            if self._scale.may_fall:
                return loss, math.inf
            suspects = self._suspects(micro_batches, total_tokens, step)
            raise gradient_error(
                step, error, self._scale.value, suspects, self._comm, self._updater
            ) from None
        return loss, self.streamed.norm_value / self._scale.value

    def _overflowed(self, loss: float) -> StepResult:
        """Nothing is updated; the watch over leaps does not see such a step."""
        return self._result(loss, math.inf, skipped=True, note=self._scale.overflowed())

    def _released_step(
        self,
        updater: OptimizerInBackward,
        micro_batches: Sequence[MicroBatch],
        total_tokens: int,
        step: int,
        learning_rate: float,
    ) -> StepResult:
        updater.begin_step(step, learning_rate, self._scale.value)
        try:
            loss = self.compute(micro_batches, total_tokens, step, update=True)
        except GradientError as error:
            raise released_error(step, error, self._scale.value, updater) from None
        self.streamed.play(updates(self._shape))
        self._sums.clear()
        norm = updater.end()
        verdict = self._spikes.judge(step, loss, norm)
        assert not verdict.skip, "the recipe refuses it: units are updated before the norm is known"
        return self._result(loss, norm, note=verdict.note, statistics=self._measured(step))

    def _result(self, loss: float, norm: float, **told: Any) -> StepResult:
        """With what the step waited for, and layers that turned out not to be traced."""
        causes, (waited, _) = dict(self._thread.waited_for), self._thread.reset()
        told |= {"untraced": self._untraced(), "parts": dict(self._parts)}
        return StepResult(loss, norm, waited, waited_for=causes, **told)

    def _untraced(self) -> tuple[str, ...]:
        """What is new of it."""
        lines = list(self._passes.traces.untraced.values())
        new, self._told = tuple(lines[self._told :]), len(lines)
        return new

    def _measured(self, step: int) -> Mapping[str, float]:
        return (
            {} if self._statistics is None else self._statistics.measured(step, step - self._scale.left_out)
        )

    def carried(self) -> dict[str, list[float]]:
        """What a continued run needs beside weights and states to go on bitwise."""
        norm = (
            {"last_norm": [self._updater.last_norm]} if isinstance(self._updater, OptimizerInBackward) else {}
        )
        return {**self._spikes.to_json(), **norm, **self._scale.carried()}

    def carry_on(self, carried: Mapping[str, Sequence[float]]) -> None:
        """Take over what `carried` gave."""
        self._spikes.from_json(carried)
        self._scale.carry_on(carried)
        if isinstance(self._updater, OptimizerInBackward):
            (self._updater.last_norm,) = carried.get("last_norm", (0.0,))

    def _suspects(self, micro_batches: Sequence[MicroBatch], total_tokens: int, step: int) -> list[list[str]]:
        """By rank the tensors whose own sums are not finite: all is computed once more. Collective."""
        self._sums.clear()
        self._sums.suspects = set()
        self.compute(micro_batches, total_tokens, step)
        found = self._comm.gather_json(sorted(self._sums.suspects))
        self._sums.suspects = None
        return found

    def _mixed(self, by_micro: Sequence[Sequence[float]]) -> tuple[float, list[float]]:
        """The loss of the step and of each of this rank's micro-batches, from their parts. Collective."""
        how = self.work.distillation
        if how is None:
            losses = [loss for (loss,) in by_micro]
            return self._in_order(losses), losses
        parts = [self._in_order([one[part] for one in by_micro]) for part in (0, 1)]
        self._parts = dict(zip(PARTS, parts, strict=True))
        return how.mixed(*parts), [how.mixed(*one) for one in by_micro]

    def _in_order(self, losses: Sequence[float]) -> float:
        """Sum of all ranks' losses in the order of the micro-batches, in fp64."""
        by_rank = self._comm.gather_arrays(np.array(losses, np.float64))
        ordered: dict[int, float] = {}
        for rank, values in enumerate(by_rank):
            members = [j for cell in self.work.layout.of_rank(rank) for j in cell]
            ordered |= dict(zip(members, values.tolist(), strict=True))
        return sum(ordered[j] for j in sorted(ordered))
