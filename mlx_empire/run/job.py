"""Which steps a recipe asks for: how many, on which rows, at which learning rate, and what comes after which of them.

A pure function of the recipe and the data: training, the daughters and the fidelity audit read the same one. Steps
count from 1; 0 is the state before the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mlx_empire.data.batches import MicroBatch, micro_batch, positions, valid_tokens
from mlx_empire.data.order import Order, reading_order
from mlx_empire.data.rows import Rows
from mlx_empire.data.taught import TeacherValues
from mlx_empire.engine.trainer import StepResult
from mlx_empire.optim.choose import LearningRate
from mlx_empire.plan.lengths import Every, Lengths
from mlx_empire.recipe.evaluation import Gate
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.sources import data_size


@dataclass(frozen=True)
class Job:
    """The steps 1 to `steps` on `data`, whose rows are read in `order`.

    `global_size` and `micro_size` are the rows of a step and of a micro-batch, `indices` the step's micro-batches that
    this rank computes, in the order of its cells. `rates(step)` is a step's learning rate, `qat_warmup` the steps
    until ternary weights are rounded in full (None: weights are not trained so), `teacher` what one says of the rows,
    where it is asked. `eval_every`, `save_every`
    and `log_every` say how often. `gate` ends the run early.
    """

    data: Rows
    order: Order
    global_size: int
    micro_size: int
    indices: tuple[int, ...]
    steps: int
    rates: LearningRate
    qat_warmup: int | None
    eval_every: Every
    save_every: Every
    log_every: Every
    gate: Gate | None
    teacher: TeacherValues | None = None

    @classmethod
    def of(cls, recipe: Recipe, data: Rows) -> Job:
        """The job of one rank alone, which computes all micro-batches of a step."""
        batch, schedule = recipe.batch, recipe.schedule
        lengths = Lengths.of(recipe, data_size(recipe, data))
        rows = [len(part) for part in data.parts]
        rate = recipe.optimizer.learning_rate
        return cls(
            data=data,
            order=reading_order(recipe.data, rows, recipe.run.seed, batch.global_size, lengths.steps),
            global_size=batch.global_size,
            micro_size=batch.micro_size,
            indices=tuple(range(batch.global_size // batch.micro_size)),
            steps=lengths.steps,
            rates=LearningRate(schedule.type, rate, lengths.warmup, lengths.steps, schedule.final),
            qat_warmup=lengths.qat_warmup,
            eval_every=lengths.evaluate,
            save_every=lengths.save,
            log_every=lengths.log,
            gate=recipe.evaluation.stop_when,
        )

    def part(self, cells: Sequence[range]) -> Job:
        """The job of a rank that computes the micro-batches of these cells."""
        return replace(self, indices=tuple(j for cell in cells for j in cell))

    def batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step."""
        sizes = {"global_size": self.global_size, "micro_size": self.micro_size}
        batches = [micro_batch(self.data, self.order, step - 1, j, **sizes) for j in self.indices]
        if self.teacher is None:
            return batches
        return [replace(batch, teacher=partial(self.teacher.of, batch)) for batch in batches]

    def strength(self, step: int) -> float:
        """How far the weights of a step are rounded: 0 in the first one, 1 after the warm-up; a number of it alone."""
        return min(1.0, (step - 1) / self.qat_warmup) if self.qat_warmup else 1.0

    def targets(self, step: int) -> int:
        """Targets that count in the whole step, on all ranks: what the loss is divided by."""
        return valid_tokens(self.data, self.order, step - 1, global_size=self.global_size)

    def positions(self, step: int) -> int:
        """Input positions that are computed in the whole step, on all ranks, padding included."""
        sizes = {"global_size": self.global_size, "micro_size": self.micro_size}
        return positions(self.data, self.order, step - 1, **sizes)

    def record(self, step: int, taken: StepResult, seconds: float) -> dict[str, Any]:
        """One line of metrics.jsonl for a step that took so long; figures by rank are added by the report."""
        targets, positions = self.targets(step), self.positions(step)
        return {
            "step": step,
            "epoch": step * self.global_size / len(self.data),
            "loss": taken.loss,
            **taken.parts,
            "learning_rate": self.rates(step),
            **({} if self.qat_warmup is None else {"qat_strength": self.strength(step)}),
            "grad_norm": taken.gradient_norm,
            "tokens": targets,
            "tokens_per_second": targets / seconds,
            "positions": positions,
            "positions_per_second": positions / seconds,
            "step_seconds": seconds,
            "comm_wait_seconds": taken.wait_seconds,
            **({"skipped": True} if taken.skipped else {}),
            **taken.statistics,
        }

    def ends(self, step: int) -> bool:
        """Whether no step is left after this one."""
        return step >= self.steps

    def evaluates(self, step: int, waited: float = 0.0) -> bool:
        """Whether the state after `step` is evaluated: at the beginning, every so often, and at the end.

        `waited`: seconds since the last evaluation.
        """
        return bool(self.eval_every) and (step == 0 or self.ends(step) or self.eval_every.due(step, waited))

    def saves(self, step: int, waited: float = 0.0, *, last: bool) -> bool:
        """Whether the state after `step` is saved: every so often, and where it is the run's last.

        `waited`: seconds since the last save.
        """
        return bool(self.save_every) and (last or self.save_every.due(step, waited))
