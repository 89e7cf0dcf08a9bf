"""From what the recipe asks and what the nodes have to one plan: stage, shares, tail and gradient dtype.

`auto` values are resolved here and nowhere else, so a report before the run and the run itself agree. Memory may
choose only what does not affect bits (stage, shares, the tail's k, kept products, waves); the gradient's dtype does, so
it is chosen once and kept. Where bits are strict a run that goes on takes the tail and the kept products that it noted,
while they fit. The order of preference: gradients in fp32 before bf16, then the stage with the least traffic that fits,
then the longest tail that fits and products in what it leaves, or products alone, whichever leaves the fewest
operations to the slowest rank; where weights stay whole and none of these fits, micro-batches in the largest waves that
do. Any plan that leaves headroom comes before any that is tight. Layers' inputs go to files where that is asked for; by
`auto` where nothing fits without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from mlx_empire.cluster.hostfile import Node
from mlx_empire.errors import UserError
from mlx_empire.model.attention.segments import SHORT
from mlx_empire.model.closed_forms import root_use
from mlx_empire.model.distillation import Distillation
from mlx_empire.model.spec import ModelSpec
from mlx_empire.plan.actions import StepShape
from mlx_empire.plan.fill import Recomputation, fill, most_operations
from mlx_empire.plan.memory import stored
from mlx_empire.plan.node_kernels import LINEAR, has_metal, is_cpu, kernels_differ, on_cpus
from mlx_empire.plan.optimizer_bytes import StateBytes
from mlx_empire.plan.shards import ShardPlan, make_plan
from mlx_empire.plan.shares import TIGHT_HEADROOM, RunPlan, plan_at_stage
from mlx_empire.plan.step_traffic import step_traffic
from mlx_empire.plan.traffic import card_bytes
from mlx_empire.plan.workload import CellLayout, Workload, cell_layout
from mlx_empire.recipe.schema import Recipe

STAGES = (2, 1, 0, 3)  # on equal traffic the one that keeps less comes first


def resolve(
    recipe: Recipe,
    spec: ModelSpec,
    nodes: Sequence[Node],
    state_bytes: StateBytes,
    noted: Recomputation | None = None,
) -> RunPlan:
    """The plan for `recipe` on `nodes`, one per rank; where nothing fits, that whose fullest rank is least too full.

    `noted`: what is taken in place of `auto` where bits are strict and it fits, headroom or not.
    """
    asked = recipe.memory.activation_offload
    found = _resolved(recipe, spec, nodes, state_bytes, noted, offload=asked is True)
    if asked == "auto" and not found.fits:
        offloaded = _resolved(recipe, spec, nodes, state_bytes, noted, offload=True)
        return offloaded if offloaded.fits else found
    return found


def _resolved(
    recipe: Recipe,
    spec: ModelSpec,
    nodes: Sequence[Node],
    state_bytes: StateBytes,
    noted: Recomputation | None,
    *,
    offload: bool,
) -> RunPlan:
    """The plan with layers' inputs in files, or without."""
    batch, memory = recipe.batch, recipe.memory
    layout = cell_layout(batch.global_size, batch.micro_size, batch.cells, len(nodes))
    layers, reached = len(spec.units) - 1, reached_layers(spec)
    unrecomputed = {True: 0, False: reached, "auto": 0}[memory.gradient_checkpointing]
    dtypes = ("float32", "bfloat16") if memory.gradient_dtype == "auto" else (memory.gradient_dtype,)
    if spec.dtype != "bfloat16" and memory.gradient_dtype == "auto":
        dtypes = ("float32",)
    stages = _stages(memory.zero_stage, nodes)
    keeps = keeps_products(recipe, nodes)
    goes_on = noted if memory.gradient_checkpointing == "auto" and recipe.numerics.bits == "strict" else None
    hopeless = never_fits(spec, nodes, state_bytes)
    seeks_tail = memory.gradient_checkpointing == "auto" and not hopeless
    at_stage = partial(plan_at_stage, recipe, spec, nodes, state_bytes)
    ahead = partial(_ahead_where_asked, memory.run_ahead, nodes, at_stage)
    tried: list[RunPlan] = []
    tight: list[RunPlan] = []
    for dtype in dtypes:
        work = replace(_workload(recipe, spec, nodes, layout, unrecomputed, dtype), offload=offload)
        if goes_on is not None:
            as_noted = goes_on.put_into(work, layers, keeps=keeps)
            same = _somehow([at_stage(stage, as_noted) for stage in stages], at_stage)
            if same is not None:
                return ahead(same)
        plans = [at_stage(stage, work) for stage in stages]
        for plan in sorted(plans, key=_busiest_card):
            with_work = partial(at_stage, plan.shards.zero_stage)
            without_tail = plan
            if seeks_tail:
                plan = _longest_tail(plan, reached, with_work)
            if plan.comfortable:
                fills = keeps and plan.work.unrecomputed < reached
                found = [plan]
                if fills and plan.work.unrecomputed and without_tail.comfortable:
                    found.append(without_tail)
                found = [ahead(one) for one in found]
                return _fewest_operations(
                    spec, [_filled(one, spec, state_bytes) for one in found] if fills else found
                )
            if plan.fits:
                tight.append(plan)
        waves = [] if hopeless else _all_in_waves(plans, at_stage)
        best = _roomiest(waves)
        if best is not None and best.comfortable:
            return ahead(best)
        tight += [plan for plan in waves if plan.fits]
        tried += waves
        tried += plans
    return tight[0] if tight else min(tried, key=_overload)


def reached_layers(spec: ModelSpec) -> int:
    """How many layers the backward reaches, the last ones: a tail of more would keep what nobody comes back to."""
    trained = tuple(any(t.trainable for t in unit.tensors) for unit in spec.units)
    return StepShape(3, trained, (1,), embeds=_embeds(spec)).reached


def _embeds(spec: ModelSpec) -> bool:
    """Whether something of what the embedding uses trains."""
    return root_use(spec)[1] > 0


def _workload(
    recipe: Recipe,
    spec: ModelSpec,
    nodes: Sequence[Node],
    layout: CellLayout,
    unrecomputed: int,
    gradient_dtype: str,
) -> Workload:
    return Workload(
        recipe.batch.micro_size,
        recipe.data.sequence_length,
        layout,
        unrecomputed,
        gradient_dtype,
        recipe.comm.route,
        recipe.comm.bucket_bytes,
        recipe.optimizer.in_backward,
        LINEAR and not _needs_masks(recipe) and all(has_metal(n) for n in nodes),
        by_pattern=recipe.numerics.attention != "mask",
        compiled=recipe.numerics.compiled_layers,
        paged=not all(is_cpu(node) for node in nodes),
        strict=recipe.numerics.bits == "strict",
        embeds=_embeds(spec),
        distillation=distillation_of(recipe),
    )


def distillation_of(recipe: Recipe) -> Distillation | None:
    """How a teacher's values count in the loss; None without a teacher."""
    asked = recipe.distillation
    return None if asked.teacher is None else Distillation(asked.weight, asked.temperature, asked.top)


def never_fits(spec: ModelSpec, nodes: Sequence[Node], state_bytes: StateBytes) -> bool:
    """Whether weights and states, each kept once, are more than all nodes together may use.

    Then nothing fits, whatever a step needs besides, and no layer has to be traced to say so.
    """
    question = ("on one rank",)
    if question not in spec.known:
        spec.known[question] = make_plan(spec.units, [1.0], 3)
    alone: ShardPlan = spec.known[question]
    return sum(stored(alone, 0, state_bytes).values()) > usable(nodes)


def usable(nodes: Sequence[Node]) -> int:
    """Bytes that all nodes together may use."""
    return sum(int(n.limit_bytes or 0) for n in nodes)


def _needs_masks(recipe: Recipe) -> bool:
    """Whether documents of a row are kept apart by a mask."""
    short = recipe.data.sequence_length <= SHORT
    return recipe.data.packing and (short or recipe.numerics.attention == "mask")


def _stages(asked: Literal["auto"] | int, nodes: Sequence[Node]) -> tuple[int, ...]:
    """The stages to try. At stage 0 every rank computes the same update, which only equal kernels do to the bit."""
    odd = kernels_differ(nodes)
    if odd and asked == 0:
        raise UserError(
            f"memory.zero_stage: 0: every rank computes the same update, and kernels of different GPUs or systems may "
            f"differ in the last bit ({odd}); use 1, 2, 3 or auto, or the same macOS on the same chips"
        )
    if asked != "auto":
        return (asked,)
    return tuple(stage for stage in STAGES if stage or not odd)


def _ahead_where_asked(
    asked: bool | Literal["auto"],
    nodes: Sequence[Node],
    at_stage: Callable[[int, Workload], RunPlan],
    plan: RunPlan,
) -> RunPlan:
    if plan.work.offload:  # a layer that is handed over would hold what was read for it
        return plan
    if asked is True or (asked == "auto" and on_cpus(nodes)):
        with_work = partial(at_stage, plan.shards.zero_stage)
        return _running_ahead(plan, with_work, only_free=asked == "auto")
    return plan


def _running_ahead(plan: RunPlan, with_work: Callable[[Workload], RunPlan], *, only_free: bool) -> RunPlan:
    """`plan` with a main thread that runs ahead of the device, where that leaves headroom; `only_free`: and where no
    node needs more for it."""
    ahead = with_work(replace(plan.work, run_ahead=True))
    free = all(a.peak <= b.peak for a, b in zip(ahead.ledgers, plan.ledgers, strict=True))
    return ahead if ahead.comfortable and (free or not only_free) else plan


def keeps_products(recipe: Recipe, nodes: Sequence[Node]) -> bool:
    """Whether spare memory may keep results of recomputed layers; unless asked for, on CPUs alone."""
    asked = recipe.memory.keep_products
    allowed = on_cpus(nodes) if asked == "auto" else asked
    return allowed and recipe.memory.gradient_checkpointing == "auto"


def _filled(plan: RunPlan, spec: ModelSpec, state_bytes: StateBytes) -> RunPlan:
    """`plan` with kept products as far as they leave headroom."""
    most = [int((1 - TIGHT_HEADROOM) * limit) for limit in plan.limits]
    work, ledgers = fill(spec, plan.shards, plan.work, plan.ledgers, most, state_bytes)
    return replace(plan, work=work, ledgers=ledgers)


def _fewest_operations(spec: ModelSpec, plans: Sequence[RunPlan]) -> RunPlan:
    if len(plans) == 1:
        return plans[0]
    return min(plans, key=lambda plan: most_operations(spec, plan.shards, plan.work))


def _longest_tail(none: RunPlan, layers: int, with_work: Callable[[Workload], RunPlan]) -> RunPlan:
    """The plan with the longest un-recomputed tail, of at most so many layers, that leaves headroom, else `none` (that
    without a tail).

    With many micro-batches a longer tail may need less, for it keeps no inputs, so where `none` does not fit a few
    lengths are tried first. What is needed is nearly convex in the length: above one that fits lies one border.
    """

    def with_tail(unrecomputed: int) -> RunPlan:
        return with_work(replace(none.work, unrecomputed=unrecomputed))

    low, best = 0, none
    if not none.fits:
        lengths = sorted({layers, 3 * layers // 4, layers // 2, layers // 4, 1} - {0}, reverse=True)
        found = next(
            ((unrecomputed, plan) for unrecomputed in lengths if (plan := with_tail(unrecomputed)).fits), None
        )
        if found is None:
            return none
        low, best = found
    high = layers + 1
    while high - low > 1:
        middle = (low + high) // 2
        plan = with_tail(middle)
        if plan.comfortable:
            low, best = middle, plan
        else:
            high = middle
    return best


def _may_pass_in_waves(plan: RunPlan) -> bool:
    """Whether weights stay whole, so that a second visit gathers nothing, and a rank has several micro-batches. Stage 1
    keeps whole contributions of all cells until the end, and gains nothing."""
    stage, layout = plan.shards.zero_stage, plan.work.layout
    return stage != 1 and (stage != 3 or layout.world_size == 1) and layout.micro_batches > layout.world_size


def _all_in_waves(plans: Sequence[RunPlan], at_stage: Callable[[int, Workload], RunPlan]) -> list[RunPlan]:
    """Those of the plans that may pass in waves, passing so."""
    may = [plan for plan in plans if _may_pass_in_waves(plan)]
    return [_in_waves(plan, partial(at_stage, plan.shards.zero_stage)) for plan in may]


def _in_waves(whole: RunPlan, with_work: Callable[[Workload], RunPlan]) -> RunPlan:
    """The plan whose micro-batches pass in the largest waves that leave headroom, else in waves of one.

    One machine pays nothing for it but some waits: what has to be computed is the same.
    """

    def passing(wave: int) -> RunPlan:
        return with_work(replace(whole.work, wave=wave))

    low, best = 1, passing(1)
    high = 1 + len(whole.work.layout.members(0))  # cells differ by one at most
    while best.comfortable and high - low > 1:
        middle = (low + high) // 2
        plan = passing(middle)
        low, high = (middle, high) if plan.comfortable else (low, middle)
        best = plan if plan.comfortable else best
    return best


def _somehow(plans: Sequence[RunPlan], at_stage: Callable[[int, Workload], RunPlan]) -> RunPlan | None:
    """The best of those that fit, all micro-batches together or in waves."""
    return _roomiest(plans) or _roomiest(_all_in_waves(plans, at_stage))


def _roomiest(plans: Sequence[RunPlan]) -> RunPlan | None:
    """Of those that fit the one with the least traffic, and one that leaves headroom before all that are tight."""
    fitting = sorted(
        (plan for plan in plans if plan.fits), key=lambda plan: (not plan.comfortable, _busiest_card(plan))
    )
    return fitting[0] if fitting else None


def _busiest_card(plan: RunPlan) -> int:
    return max(max(pair) for pair in card_bytes(step_traffic(plan.shards, plan.work)))


def _overload(plan: RunPlan) -> float:
    """What the fullest rank needs, in units of what it may use."""
    return max(one.peak / max(limit, 1) for one, limit in zip(plan.ledgers, plan.limits, strict=True))
