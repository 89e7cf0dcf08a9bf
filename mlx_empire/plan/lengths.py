"""How long a run is, in optimizer steps, and how often it does what it does now and then.

Decides how the recipe's durations become steps, from how many rows and targets the data has: one answer for the dry run
and the run. A duration in tokens counts targets (what the loss is a mean over), never input positions. Wall time stays
seconds: steps end when they end, and rank 0's clock says when that was.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_empire.recipe.duration import Duration
from mlx_empire.recipe.schema import Recipe
from mlx_empire.recipe.sections import QAT_WARMUP

ASSUMED_STEPS = 1000  # of an epoch, or of a run given in epochs, of data that nobody has looked at


@dataclass(frozen=True)
class DataSize:
    """Rows of the training data, and the targets that count in one pass over them."""

    rows: int
    targets: int

    @classmethod
    def assumed(cls, recipe: Recipe) -> DataSize:
        """Of data that nobody has looked at: every position of full rows is a target that counts, and a run that is
        given in epochs has about `ASSUMED_STEPS` steps."""
        steps, size = recipe.run.steps, recipe.batch.global_size
        epochs = steps.value if steps.unit == "epochs" else 1.0
        rows = max(int(ASSUMED_STEPS * size / epochs), 1)
        return cls(rows, rows * recipe.data.sequence_length)


@dataclass(frozen=True)
class Every:
    """How often something is done: after every so many `steps`, or `seconds` of wall time; false where never."""

    steps: int = 0
    seconds: float = 0.0

    def __bool__(self) -> bool:
        return self.steps > 0 or self.seconds > 0

    def due(self, step: int, waited: float) -> bool:
        """Whether it is time after `step`, `waited` seconds after it was done last."""
        return step % self.steps == 0 if self.steps else 0 < self.seconds <= waited


@dataclass(frozen=True)
class Lengths:
    """A recipe's durations in steps of its data, or in seconds where they are wall time.

    `qat_warmup`: of ternary weights; None where weights are not trained so.
    """

    steps: int
    warmup: int
    evaluate: Every
    save: Every
    log: Every
    qat_warmup: int | None = None

    @classmethod
    def of(cls, recipe: Recipe, size: DataSize) -> Lengths:
        """The lengths of a run of `recipe` on data of this size."""
        run = recipe.run
        # In floating point, which may round up to one step more than the exact count: runs that are resumed were
        # begun so, and another length would be another schedule of rates.
        steps_per_epoch = size.rows / recipe.batch.global_size
        targets_per_step = max(round(size.targets / steps_per_epoch), 1)  # on average
        steps = run.steps.to_steps(None, targets_per_step, steps_per_epoch)

        def every(duration: Duration | None) -> Every:
            if duration is None:
                return Every()
            if duration.timed:
                return Every(seconds=duration.value)
            return Every(duration.to_steps(steps, targets_per_step, steps_per_epoch))

        return cls(
            steps=steps,
            warmup=every(recipe.schedule.warmup).steps,
            evaluate=every(run.eval_every),
            save=every(run.save_every),
            log=every(recipe.report.log_every),
            qat_warmup=every(recipe.tuning.qat_warmup or QAT_WARMUP).steps if recipe.tuning.qat else None,
        )
