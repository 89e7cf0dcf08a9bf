"""From what the recipe asks and what the nodes have to one plan: stage, shares, tail and gradient dtype.

`auto` values are resolved here and nowhere else, so a report before the run and the run itself agree. Memory may
choose only what does not affect bits (stage, shares, the tail's k); the gradient's dtype does, so it is chosen once
and kept. The order of preference: gradients in fp32 before bf16, then the stage with the least traffic that fits,
then the longest tail that fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlx_empire.cluster.hostfile import Node
from mlx_empire.errors import DoesNotFitError
from mlx_empire.plan.cells import cell_layout
from mlx_empire.plan.memory import Ledger, StateBytes, ledger
from mlx_empire.plan.model import ModelSpec
from mlx_empire.plan.shards import ShardPlan, make_plan
from mlx_empire.plan.shares import solve_shares
from mlx_empire.plan.traffic import card_bytes
from mlx_empire.plan.workload import Workload, step_traffic
from mlx_empire.recipe.schema import Recipe

STAGES = (2, 1, 0, 3)  # on equal traffic the one that keeps less comes first


@dataclass(frozen=True)
class RunPlan:
    """The resolved plan of a run: layout, step shape, and each rank's ledger against its limit in bytes."""

    shards: ShardPlan
    work: Workload
    ledgers: tuple[Ledger, ...]
    limits: tuple[int, ...]

    @property
    def fits(self) -> bool:
        """Whether every rank's peak is within its limit."""
        return all(one.peak <= limit for one, limit in zip(self.ledgers, self.limits, strict=True))


def resolve(recipe: Recipe, spec: ModelSpec, nodes: Sequence[Node], state_bytes: StateBytes) -> RunPlan:
    """The plan for `recipe` on `nodes`, one per rank; where nothing fits, the one that comes closest."""
    batch, memory = recipe.batch, recipe.memory
    layout = cell_layout(batch.global_size, batch.micro_size, batch.cells, len(nodes))
    layers = len(spec.units) - 1
    # Longest first. All are tried: with many micro-batches a longer tail needs less, for it keeps no inputs.
    tails = {True: [0], False: [layers], "auto": list(range(layers, -1, -1))}[memory.gradient_checkpointing]
    dtypes = ("float32", "bfloat16") if memory.gradient_dtype == "auto" else (memory.gradient_dtype,)
    if spec.dtype == "float32" and memory.gradient_dtype == "auto":
        dtypes = ("float32",)
    stages = STAGES if memory.zero_stage == "auto" else (memory.zero_stage,)
    tried: list[RunPlan] = []
    for dtype in dtypes:
        work = Workload(
            batch.micro_size,
            recipe.data.sequence_length,
            layout,
            tails[-1],
            dtype,
            recipe.comm.route,
            recipe.comm.bucket_bytes,
        )
        plans = [_shared(recipe, spec, nodes, work, stage, state_bytes) for stage in stages]
        for plan in sorted(plans, key=_busiest_card):
            stage = plan.shards.zero_stage
            for tail in tails:
                longer = _shared(recipe, spec, nodes, replace(work, tail=tail), stage, state_bytes)
                if longer.fits:
                    return longer
        tried += plans
    return min(tried, key=_excess)


def require_fit(plan: RunPlan, nodes: Sequence[Node]) -> None:
    """DoesNotFitError naming the worst node, what it needs and what could be changed."""
    if plan.fits:
        return
    pairs = list(zip(plan.ledgers, plan.limits, strict=True))
    worst = max(range(len(pairs)), key=lambda i: pairs[i][0].peak - pairs[i][1])
    need, limit = pairs[worst][0], pairs[worst][1]
    largest = sorted(need.items().items(), key=lambda kv: -kv[1])[:3]
    parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in largest)
    raise DoesNotFitError(
        f"{nodes[worst].name} (rank {worst}) needs {need.peak / 2**30:.1f} GiB and may use "
        f"{limit / 2**30:.1f} GiB at ZeRO stage {plan.shards.zero_stage} (largest: {parts}); {_remedies(plan)}"
    )


def _remedies(plan: RunPlan) -> str:
    """What could be changed, without what is so already."""
    done = any("codes" in name for name in plan.ledgers[0].resident)
    options = [
        ("memory.zero_stage: 3", plan.shards.zero_stage < 3),
        ("memory.gradient_checkpointing: true", plan.work.tail > 0),
        ("optimizer.state_bits: 8", not done),
        ("a shorter data.sequence_length", True),
        ("another node", True),
    ]
    return "try " + ", ".join(text for text, open_to in options if open_to)


def _shared(
    recipe: Recipe,
    spec: ModelSpec,
    nodes: Sequence[Node],
    work: Workload,
    stage: int,
    state_bytes: StateBytes,
) -> RunPlan:
    """The plan at one stage, with shares as the recipe asks: what a node needs beside its shard is subtracted."""
    limits = tuple(int(n.limit_bytes or 0) for n in nodes)
    ranks = range(len(nodes))
    equal = make_plan(spec.units, [1.0] * len(nodes), stage)
    shards = equal
    if recipe.memory.shares != "equal":
        fixed = [_fixed(ledger(spec, equal, work, r, state_bytes), stage) for r in ranks]
        shards = make_plan(spec.units, solve_shares(recipe.memory.shares, limits, fixed), stage)
    return RunPlan(shards, work, tuple(ledger(spec, shards, work, r, state_bytes) for r in ranks), limits)


def _fixed(one: Ledger, stage: int) -> int:
    """What a rank needs whatever its share: below stage 3 that includes the whole weights."""
    sharded = sum(
        size
        for name, size in one.resident.items()
        if name == "gradients" or name.startswith("optimizer") or (name == "weights" and stage == 3)
    )
    return one.peak - sharded


def _busiest_card(plan: RunPlan) -> int:
    return max(max(pair) for pair in card_bytes(step_traffic(plan.shards, plan.work)))


def _excess(plan: RunPlan) -> int:
    return max(one.peak - limit for one, limit in zip(plan.ledgers, plan.limits, strict=True))
