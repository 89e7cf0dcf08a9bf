"""Layers' inputs in a file: how large it is, and what is written to it, which wears a disk out.

Decides what a rank's disk is asked for where inputs of recomputed layers go to a file (`memory.activation_offload`): a
place for each of these layers and micro-batch that passes with others; each place is written once and read once a step,
or a wave. Bytes are those of rows of full width, so an upper bound. What wear means is told by an endurance that makers
state for drives they sell alone; Apple states none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_empire.model.spec import ModelSpec
from mlx_empire.plan.actions import StepShape
from mlx_empire.plan.activations import hidden_bytes
from mlx_empire.plan.chips import GIGA, TERA, Range
from mlx_empire.plan.shards import ShardPlan
from mlx_empire.plan.shares import RunPlan
from mlx_empire.plan.workload import Workload, step_shape
from mlx_empire.sizes import amount

ENDURANCE = 600  # planned: bytes that may be written for each byte of a drive, as for consumers' drives
SECONDS_PER_DAY = 86400


def file_places(shape: StepShape) -> int:
    """How many inputs lie in a rank's file at once."""
    cells = [min(cell, shape.wave or cell) for cell in shape.cells]
    return len(shape.offloaded) * (max(cells, default=0) if shape.wave else sum(cells))


def visits(shape: StepShape) -> int:
    """How many inputs a rank writes in a step, and reads again."""
    return len(shape.offloaded) * shape.micro_batches


def input_file_bytes(spec: ModelSpec, plan: ShardPlan, work: Workload, rank: int) -> int:
    """Bytes of a rank's file; 0 where it has none."""
    return file_places(step_shape(plan, work, rank)) * hidden_bytes(spec, work)


def written_bytes(spec: ModelSpec, plan: ShardPlan, work: Workload, rank: int) -> int:
    """Bytes that a rank writes in a step at most, and reads again."""
    return visits(step_shape(plan, work, rank)) * hidden_bytes(spec, work)


@dataclass(frozen=True)
class Wear:
    """Bytes that the machine writes which writes most: in a step; in the run and a day, where those are known."""

    name: str
    step: int
    run: int | None = None
    day: Range | None = None

    @property
    def told(self) -> str:
        """One sentence, for whoever owns the drive."""
        said = f"activation offload: {self.name} writes {amount(self.step)} a step and reads it again"
        if self.day is not None:
            said += f", {' to '.join(dict.fromkeys(map(_decimal, self.day)))} a day"
        said += f"; a drive of 1 TB is good for about {ENDURANCE} TB (planned: Apple states nothing)"
        if self.run is None:
            return said
        return (
            f"{said}: the run's {_decimal(self.run)} are {100 * self.run / (ENDURANCE * TERA):.2g} % of that"
        )


def wear_of(
    spec: ModelSpec,
    plan: RunPlan,
    names: Sequence[str],
    steps: int | None = None,
    seconds: Range | None = None,
) -> Wear | None:
    """The wear of a run of so many `steps`, each of which takes `seconds`, as far as that is known; `names`: of the
    machines by rank, whose ranks share a drive. None where nothing is offloaded."""
    by_name = dict.fromkeys(names, 0)
    for rank, name in enumerate(names):
        by_name[name] += written_bytes(spec, plan.shards, plan.work, rank)
    name, step = max(by_name.items(), key=lambda pair: pair[1])
    if not step:
        return None
    day = None
    if seconds is not None:
        low, high = seconds
        day = step * SECONDS_PER_DAY / high, step * SECONDS_PER_DAY / low
    return Wear(name, step, None if steps is None else step * steps, day)


def _decimal(size: float) -> str:
    """As makers of drives count."""
    return f"{size / TERA:.3g} TB" if size >= TERA else f"{size / GIGA:.3g} GB"
