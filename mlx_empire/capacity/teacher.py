"""What the one pass of a recipe's teacher needs before the first step: memory on each machine, time, and disk.

The pass is planned as it is made (`run.teacher`): the teacher alone, nothing trained, every row by itself. Its time is
that of its positions, all rows padded to data.sequence_length; how many rows there are is known where a length of the
run made the report count them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_empire.cluster.hostfile import Node
from mlx_empire.errors import UserError
from mlx_empire.formats.hf_folder import stored_if_whole
from mlx_empire.model.distillation import bytes_per_target
from mlx_empire.model.target import planned_target
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.assess import Assessment, assess
from mlx_empire.plan.chips import Chip, Range
from mlx_empire.plan.hardware import Wire
from mlx_empire.plan.lengths import DataSize
from mlx_empire.plan.pace import pace_of
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.text import run_length
from mlx_empire.run.forward_only import frozen
from mlx_empire.run.teacher import KEY, asked_recipe
from mlx_empire.sizes import amount


@dataclass(frozen=True)
class TeacherPass:
    """`plan`: of the pass, None where the teacher is not here (`missing` says so). `target_bytes`: kept of a target;
    `size`: of the data and `hours` of the pass over it, None where they are not known."""

    named: str
    plan: Assessment | None
    missing: str
    target_bytes: int
    size: DataSize | None
    hours: Range | None

    @property
    def verdict(self) -> str:
        """That of the machine on which the teacher has least room."""
        return "fits" if self.plan is None else self.plan.verdict

    @property
    def sentence(self) -> str:
        """All of it in one line."""
        kept = f"{self.target_bytes:,} bytes kept of each target that counts, on each machine"
        if self.size is not None:
            kept += f": {amount(self.target_bytes * self.size.targets)}"
        if self.plan is None:
            return f"{KEY}: {self.named}: its pass is not planned ({self.missing}); {kept}"
        worst = self.plan.worst
        time = "" if self.hours is None else f", {run_length(self.hours)}"
        return (
            f"{KEY}: {self.named}: one pass over all rows before the first step: {self.verdict}, at most "
            f"{amount(worst.peak_bytes)} of {worst.node.name}'s {amount(worst.limit_bytes)}{time}; {kept}"
        )


def teacher_pass(
    recipe: Recipe, nodes: Sequence[Node], wire: Wire, chips: Sequence[Chip] | None, size: DataSize | None
) -> TeacherPass | None:
    """The pass of the recipe's teacher; None where there is none. `chips`: of the nodes, None where none is known."""
    teacher = recipe.distillation.teacher
    if teacher is None:
        return None
    about, each = str(teacher), bytes_per_target(recipe.distillation.top)
    asked = asked_recipe(recipe, len(nodes))
    try:
        spec = frozen(planned_target(asked, stored_if_whole)).spec
    except UserError as error:
        return TeacherPass(about, None, str(error), each, size, None)
    plan, hours = assess(asked, spec, nodes, state_bytes_of), None
    if chips is not None and size is not None:
        steps = size.rows / asked.batch.global_size
        low, high = pace_of(plan, wire, chips).step_seconds
        hours = (low * steps / 3600, high * steps / 3600)
    return TeacherPass(about, plan, "", each, size, hours)
