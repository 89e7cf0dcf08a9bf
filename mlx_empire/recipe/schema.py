"""A whole recipe, and which values are impossible together though each is valid.

Relative paths are relative to the directory in which the command is run (on every machine); `~` is expanded. Whether a
path exists is the business of whoever opens it.
"""

import math
from typing import Self

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from mlx_empire.recipe.distillation import DistillationSection
from mlx_empire.recipe.evaluation import EvaluationSection
from mlx_empire.recipe.fields import Section
from mlx_empire.recipe.mixture import gap
from mlx_empire.recipe.run_sections import (
    CommSection,
    DaughtersSection,
    NumericsSection,
    ReportSection,
    RunSection,
)
from mlx_empire.recipe.sections import (
    PARTS,
    BatchSection,
    DataSection,
    MemorySection,
    ModelSection,
    TuningSection,
)
from mlx_empire.recipe.update_sections import OptimizerSection, ScheduleSection


class Recipe(Section):
    """One training run, as asked for. Immutable; equal recipes mean equal runs."""

    model: ModelSection
    tuning: TuningSection = TuningSection()
    data: DataSection
    distillation: DistillationSection = DistillationSection()
    batch: BatchSection
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    memory: MemorySection = MemorySection()
    comm: CommSection = CommSection()
    numerics: NumericsSection = NumericsSection()
    report: ReportSection = ReportSection()
    evaluation: EvaluationSection = EvaluationSection()
    daughters: DaughtersSection = DaughtersSection()
    run: RunSection

    @model_validator(mode="after")
    def _possible(self) -> Self:
        batch = self.batch
        size, micro = batch.global_size, batch.micro_size
        if size % micro:
            larger = -(-size // micro) * micro
            raise impossible(
                ("batch.micro_size", "batch.global_size"),
                f"global_size {size} is not a multiple of micro_size {micro}; use micro_size "
                f"{largest_divisor(size, micro)} or global_size {larger}",
            )
        if isinstance(batch.cells, int) and batch.cells > size // micro:
            raise impossible(
                ("batch.cells", "batch.micro_size", "batch.global_size"),
                f"cells {batch.cells} is more than the {size // micro} micro-batches of a step "
                f"(global_size {size} / micro_size {micro}); use {size // micro} or less",
            )
        for name in self.run.accept_changes:
            section, key = name.split(".")
            if key not in getattr(type(self).model_fields.get(section), "annotation", Section).model_fields:
                raise impossible(
                    ("run.accept_changes",), f"there is no key {name}; use keys such as run.steps"
                )
        self._possible_half()
        if self.tuning.bits is not None and self.tuning.type != "qlora":
            message = f"bits {self.tuning.bits} has no meaning for type {self.tuning.type}; use type qlora"
            raise impossible(("tuning.bits", "tuning.type"), message)
        if (wrong := _wrong_qat(self.tuning)) is not None:
            raise impossible((f"tuning.{wrong[0]}", "tuning.type"), wrong[1])
        idle = next((k for k, v in self.tuning if k not in ("type", *PARTS, *QAT) and v is not None), None)
        if self.tuning.type != "full" and self.tuning.unfrozen_parameters is not None:
            message = (
                "adapters train alone; use type full, or leave it out and name modules in tuning.targets"
            )
            raise impossible(("tuning.unfrozen_parameters", "tuning.type"), message)
        if self.tuning.type == "full" and idle:
            message = (
                f"{idle} has no meaning for type full; use type lora, dora or qlora, or leave {idle} out"
            )
            raise impossible((f"tuning.{idle}", "tuning.type"), message)
        if self.tuning.start is not None and self.model.init == "random":
            message = "an adapter belongs to the weights it was trained on; use model.init pretrained"
            raise impossible(("tuning.start", "model.init"), message)
        return self

    @property
    def dynamic_loss_scale(self) -> bool:
        """Whether losses are multiplied by a number that follows overflows, which leaves steps out."""
        return self.model.dtype == "float16" and self.numerics.loss_scale == "auto"

    def _possible_half(self) -> None:
        """What float16 excludes: masters that complete a bfloat16 weight, and updates before an overflow is known."""
        optimizer, scale = self.optimizer, self.numerics.loss_scale
        half = self.model.dtype == "float16"
        if half and optimizer.master_weights in ("diet", "none"):
            message = f"{optimizer.master_weights} completes bfloat16 weights; with float16 use exact or fp32"
            raise impossible(("optimizer.master_weights", "model.dtype"), message)
        if half and self.memory.gradient_dtype == "bfloat16":
            message = "bfloat16 would keep less of a float16 gradient than there is; use auto or float32"
            raise impossible(("memory.gradient_dtype", "model.dtype"), message)
        if not half and scale != "auto":
            message = f"{scale} serves float16 alone, for other numbers reach as far as float32; leave it out"
            raise impossible(("numerics.loss_scale", "model.dtype"), message)
        if optimizer.in_backward and self.dynamic_loss_scale:
            message = "in_backward updates before an overflow is known; use false, or a number for numerics.loss_scale"
            raise impossible(("optimizer.in_backward", "numerics.loss_scale"), message)

    @model_validator(mode="after")
    def _possible_data(self) -> Self:
        data = self.data
        if data.path is None and not data.sources:
            described = type(data).model_fields["path"].description
            raise impossible(("data.path",), f"missing; give {described}")
        if data.path is not None and data.sources:
            message = "there is data.path as well; give one of the two (data.path=null or data.sources=[])"
            raise impossible(("data.sources", "data.path"), message)
        if data.sources and (empty := gap(data.sources)) is not None:
            message = f"no source is open {empty}; widen from and to of one until all of it is covered"
            raise impossible(("data.sources",), message)
        if data.order == "file" and data.packing:
            message = (
                "order file has no meaning with packing, which sorts documents by length; use packing false"
            )
            raise impossible(("data.order", "data.packing"), message)
        return self

    @model_validator(mode="after")
    def _possible_run(self) -> Self:
        schedule, steps, run = self.schedule, self.run.steps, self.run
        wrong = self.evaluation.contradiction(evaluates=run.eval_every is not None)
        if wrong:
            raise impossible((f"evaluation.{wrong[0]}",), wrong[1])
        if schedule.warmup.unit == steps.unit and schedule.warmup.value > steps.value:
            message = f"warmup {schedule.warmup} is longer than the whole run, run.steps {steps}; use 3%"
            raise impossible(("schedule.warmup", "run.steps"), message)
        ternary = self.tuning.qat_warmup
        if ternary is not None and ternary.unit == steps.unit and ternary.value > steps.value:
            message = f"qat_warmup {ternary} is longer than the whole run, run.steps {steps}; use 10%"
            raise impossible(("tuning.qat_warmup", "run.steps"), message)
        spikes = self.numerics.spikes
        if spikes == "rollback" and run.save_every is None:
            message = "rollback needs checkpoints to go back to; set run.save_every"
            raise impossible(("numerics.spikes", "run.save_every"), message)
        if spikes == "rollback" and run.save_every is not None and run.save_every.timed:
            message = (
                f"with rollback the result would hang on when save_every {run.save_every} happens to save; use "
                "steps, such as 100, or percent"
            )
            raise impossible(("run.save_every", "numerics.spikes"), message)
        if self.evaluation.stop_when and run.eval_every is not None and run.eval_every.timed:
            message = (
                f"with evaluation.stop_when the run's end would hang on when eval_every {run.eval_every} happens "
                "to evaluate; use steps, such as 100, or percent"
            )
            raise impossible(("run.eval_every", "evaluation.stop_when"), message)
        if self.optimizer.in_backward and spikes in ("skip", "rollback"):
            message = f"{spikes} cannot be had with optimizer.in_backward, which updates before it is known; use log"
            raise impossible(("numerics.spikes", "optimizer.in_backward"), message)
        if schedule.type == "constant" and schedule.final:
            raise impossible(
                ("schedule.final", "schedule.type"),
                f"final {schedule.final} has no meaning for a constant schedule; "
                "use type cosine or linear, or leave final out",
            )
        return self


QAT = ("qat", "qat_warmup", "qat_group")


def _wrong_qat(tuning: TuningSection) -> tuple[str, str] | None:
    """The key of `QAT` that has no meaning with the others, and why."""
    asked = next((key for key in QAT if getattr(tuning, key) is not None), None)
    if asked is not None and tuning.type != "full":
        remedy = "use type full, or qlora with bits ternary for a frozen ternary base"
        return asked, f"{asked} has no meaning for type {tuning.type}, which trains no weights; {remedy}"
    if asked not in (None, "qat"):
        return asked, f"{asked} has no meaning without tuning.qat; add qat: ternary, or leave {asked} out"
    if asked is not None and tuning.of_parts:
        return (
            asked,
            "what is frozen cannot be trained for being rounded; leave layers and unfrozen_parameters out",
        )
    return None


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is not above `limit`, in sqrt(number) divisions."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return max(d for pair in small for d in (pair, number // pair) if d <= limit)


def impossible(keys: tuple[str, ...], message: str) -> PydanticCustomError:
    """The error for values that are valid one by one and impossible together; `keys` in order of
    suspicion.
    """
    return PydanticCustomError("impossible", "{message}", {"message": message, "keys": keys})
