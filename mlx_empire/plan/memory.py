"""The memory ledger: what a rank needs, by name, in bytes, and in which phase of a step it needs it.

`resident` is there for the whole step; each phase adds what is alive in it alone, at its worst moment. The peak is
resident + the largest phase, which `step_bytes` plays. `capacity.ledger_groups` says of every name what it is and how
well it is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from mlx_empire.model.spec import ModelSpec
from mlx_empire.plan.activations import costs_of
from mlx_empire.plan.optimizer_bytes import StateBytes, state_sizes
from mlx_empire.plan.schedule import folded_step
from mlx_empire.plan.shards import Segment, ShardPlan, Unit
from mlx_empire.plan.step_bytes import Items, StepBytes
from mlx_empire.plan.traffic import ADDED_AT_ONCE, staging_bytes
from mlx_empire.plan.workload import Workload

BASE = 1 << 16  # MLX buffers that are no tensor: rotary tables, scalars
ROUNDING = 1 << 13  # half a page of Metal's allocator


@dataclass(frozen=True)
class Ledger:
    """Bytes by name: for the whole step, and by phase. `derived`: whether the layers' own graphs could be played.

    `spare`: as much as the buffers of "gradients" may take at any moment, those included that are not in use then, and
    the peak stays what it is.
    """

    resident: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]
    derived: bool = True
    spare: int = 0

    @cached_property
    def largest_phase(self) -> str:
        """The phase that sets the peak."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @cached_property
    def peak(self) -> int:
        """Bytes needed at the worst moment of a step."""
        return sum(self.resident.values()) + sum(self.phases[self.largest_phase].values())

    def items(self) -> dict[str, int]:
        """What makes up the peak, by name."""
        return {**self.resident, **self.phases[self.largest_phase]}

    def most(self, count: int = 3) -> str:
        """The largest of these in 10^9 bytes, `weights 15.2, layer inputs 6.6`: what there is to say of a peak."""
        largest = sorted(self.items().items(), key=lambda entry: -entry[1])[:count]
        return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in largest)


def ledger(spec: ModelSpec, plan: ShardPlan, work: Workload, rank: int, state_bytes: StateBytes) -> Ledger:
    """What `rank` needs for a training step of `work`; `state_bytes` comes from the optimizer."""
    staging = max((_staging(u, rank, work.bucket_bytes) for u in plan.units), default=0)
    resident = {
        **stored(plan, rank, state_bytes),
        "exchange buffers": staging + 4 * ADDED_AT_ONCE,
        "MLX base": BASE + costs_of(spec, work).argument_bytes,
        "allocator margin": work.paged
        * ROUNDING
        * sum(_odd_arrays(s) for u in plan.units for s in u.segments),
    }
    step = StepBytes(spec, plan, work, rank, state_bytes)
    step.play(folded_step(step.shape, "peak"))
    named = {name: size for name, size in resident.items() if size}
    return Ledger(named, step.phases, costs_of(spec, work).derived, step.spare)


def stored(plan: ShardPlan, rank: int, state_bytes: StateBytes) -> Items:
    """What `rank` keeps between steps, by name: weights, adapters and the optimizer's states."""
    sizes = plan.sizes[rank]
    adapters = sum(s.adapters for s in sizes)
    weights = sum(s.kept for s in sizes) - adapters
    return {"weights": weights, "adapters": adapters, **state_sizes(plan, rank, state_bytes)}


def _odd_arrays(segment: Segment) -> int:
    """Arrays that may not fill their last page: a segment's buffer, and small tensors' states."""
    return 1 + (len(segment.placements) if segment.kind == "small" else 0)


def _staging(unit: Unit, rank: int, bucket_bytes: int) -> int:
    segments = unit.segments
    trained = [s for s in segments if s.kind != "frozen"]
    return max((staging_bytes(s.edges, s.itemsize, rank, bucket_bytes) for s in trained), default=0)
