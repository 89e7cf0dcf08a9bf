"""One daughter while it is trained: what it learns by, how far it is, and when it is scored, saved or pauses."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

from mlx_empire.checkpoint.manifest import Origin
from mlx_empire.data.splits import Splits
from mlx_empire.evaluation.evaluator import Evaluator
from mlx_empire.evaluation.gate import GateKeeper
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.metrics import MetricsWriter
from mlx_empire.run.job import Job


class JobsOf(Protocol):
    """What each daughter is to learn (`source.JobSource`)."""

    def of(self, name: str) -> Recipe:
        """The recipe of its job."""
        ...

    def begun(self, name: str, *, goes_on: bool) -> None:
        """Its folder is there, of one that begins or goes on. UserError, OSError."""
        ...

    def done(self, name: str) -> str:
        """Its result is written; what there is to say of that. UserError, OSError."""
        ...


@dataclass
class Daughter:
    """A daughter in a place, after `step` steps of the job; `saved`: the step of the file; `pause`: that after which it
    is evaluated, saved, and leaves its place for now. When it was saved and evaluated last, this machine's monotonic
    clock says, or when it came.
    """

    name: str
    recipe: Recipe
    splits: Splits
    origin: Origin
    job: Job
    evaluator: Evaluator | None
    gate: GateKeeper
    metrics: MetricsWriter
    step: int
    saved: int
    pause: int | None = None
    saved_at: float = field(default_factory=time.monotonic)
    evaluated_at: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> bool:
        """Whether no step is left, or it has learnt enough."""
        return self.job.ends(self.step) or self.gate.reached

    @property
    def pauses(self) -> bool:
        """Whether it leaves its place for now."""
        return self.pause is not None and self.step >= self.pause and not self.done

    def to_be_scored(self, now: float) -> bool:
        """Whether it is evaluated now: so often, and before it leaves its place."""
        return self.done or self.pauses or self.job.evaluates(self.step, now - self.evaluated_at)

    def only_compared(self, now: float) -> bool:
        """Whether it is evaluated only because it leaves its place: alone it would not be."""
        return self.pauses and not self.job.evaluates(self.step, now - self.evaluated_at)

    def to_be_saved(self, now: float) -> bool:
        """Whether so many steps, or so much time, would be lost, or it is done."""
        every = self.job.save_every
        if self.pauses:
            return True
        lost = self.step - self.saved >= every.steps if every.steps else now - self.saved_at >= every.seconds
        return bool(every) and (self.done or lost)
