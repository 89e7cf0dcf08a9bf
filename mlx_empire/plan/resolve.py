"""From what the recipe asks and what the nodes have to one plan: stage, shares, tail and gradient dtype.

`auto` values are resolved here and nowhere else, so a report before the run and the run itself agree. Memory may
choose only what does not affect bits (stage, shares, the tail's k, kept products); the gradient's dtype does, so it is
chosen once and kept. The order of preference: gradients in fp32 before bf16, then the stage with the least traffic that
fits, then the longest tail that fits and products in what it leaves, or products alone, whichever leaves the fewest
operations to the slowest rank. Any plan that leaves headroom comes before any that is tight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Literal

from mlx_empire.cluster.hostfile import Node
from mlx_empire.errors import UserError
from mlx_empire.model.attention.segments import SHORT
from mlx_empire.model.spec import ModelSpec
from mlx_empire.plan.fill import fill, most_operations
from mlx_empire.plan.hardware import CPU, chip_of
from mlx_empire.plan.memory import Ledger, ledger, stored
from mlx_empire.plan.optimizer_bytes import StateBytes
from mlx_empire.plan.shards import ShardPlan, make_plan
from mlx_empire.plan.step_traffic import step_traffic
from mlx_empire.plan.traffic import card_bytes
from mlx_empire.plan.workload import Workload, cell_layout
from mlx_empire.recipe.schema import Recipe


def solve_shares(
    mode: str | Sequence[float], limits: Sequence[int], fixed: Sequence[int]
) -> tuple[float, ...]:
    """Shares of all ranks, summing to 1.

    `limits` and `fixed` are bytes per rank: what the rank may use and what it needs whatever its share. `memory`
    gives share_i ~ limit_i - fixed_i, so that all ranks use the same fraction of what they have left; a rank with
    nothing left gets nothing. If no rank has anything left the shares follow the limits (the ledger then says no).
    """
    if mode == "equal":
        weights: list[float] = [1.0] * len(limits)
    elif mode == "memory":
        weights = [float(max(limit - need, 0)) for limit, need in zip(limits, fixed, strict=True)]
        if not any(weights):
            weights = [float(limit) for limit in limits]
    else:
        assert not isinstance(mode, str)
        weights = [float(w) for w in mode]
        if len(weights) != len(limits):
            raise UserError(
                f"memory.shares: {list(mode)} names {len(weights)} ranks but {len(limits)} run; list one per rank"
            )
        if min(weights) < 0 or not sum(weights) > 0:
            raise UserError(f"memory.shares: {list(mode)}: weights must not be negative, nor all zero")
    total = sum(weights)
    return tuple(w / total for w in weights)


TIGHT_HEADROOM = 0.05  # of the limit; less is called tight
MOST_STRETCH, FINE_STRETCH = 2.0**20, 0.001  # of limits that hold no step
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

    @property
    def comfortable(self) -> bool:
        """Whether every rank keeps the headroom below which a plan is called tight."""
        pairs = zip(self.ledgers, self.limits, strict=True)
        return all(one.peak <= (1 - TIGHT_HEADROOM) * limit for one, limit in pairs)


def resolve(
    recipe: Recipe,
    spec: ModelSpec,
    nodes: Sequence[Node],
    state_bytes: StateBytes,
) -> RunPlan:
    """The plan for `recipe` on `nodes`, one per rank; where nothing fits, that whose fullest rank is least too full."""
    batch, memory = recipe.batch, recipe.memory
    layout = cell_layout(batch.global_size, batch.micro_size, batch.cells, len(nodes))
    layers = len(spec.units) - 1
    unrecomputed = {True: 0, False: layers, "auto": 0}[memory.gradient_checkpointing]
    dtypes = ("float32", "bfloat16") if memory.gradient_dtype == "auto" else (memory.gradient_dtype,)
    if spec.dtype == "float32" and memory.gradient_dtype == "auto":
        dtypes = ("float32",)
    stages = _stages(memory.zero_stage, nodes)
    seeks_tail = memory.gradient_checkpointing == "auto" and not never_fits(spec, nodes, state_bytes)
    tried: list[RunPlan] = []
    tight: list[RunPlan] = []
    for dtype in dtypes:
        work = Workload(
            batch.micro_size,
            recipe.data.sequence_length,
            layout,
            unrecomputed,
            dtype,
            recipe.comm.route,
            recipe.comm.bucket_bytes,
            recipe.optimizer.in_backward,
            _LINEAR and not _needs_masks(recipe) and all(_has_metal(n) for n in nodes),
            by_pattern=recipe.numerics.attention != "mask",
            compiled=recipe.numerics.compiled_layers,
            paged=not all(_is_cpu(node) for node in nodes),
        )
        plans = [_shared(recipe, spec, nodes, stage, state_bytes, work) for stage in stages]
        for plan in sorted(plans, key=_busiest_card):
            with_work = partial(_shared, recipe, spec, nodes, plan.shards.zero_stage, state_bytes)
            without_tail = plan
            if seeks_tail:
                plan = _longest_tail(plan, with_work)
            if plan.comfortable:
                keeps = keeps_products(recipe, nodes) and plan.work.unrecomputed < layers
                found = [plan]
                if keeps and plan.work.unrecomputed and without_tail.comfortable:
                    found.append(without_tail)
                if memory.run_ahead is True or (memory.run_ahead == "auto" and _on_cpus(nodes)):
                    only_free = memory.run_ahead == "auto"
                    found = [_running_ahead(one, with_work, only_free=only_free) for one in found]
                return _fewest_operations(
                    spec, [_filled(one, spec, state_bytes) for one in found] if keeps else found
                )
            if plan.fits:
                tight.append(plan)
        tried += plans
    return tight[0] if tight else min(tried, key=_overload)


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


def kernels_differ(nodes: Sequence[Node]) -> str:
    """What the GPUs' kernels are compiled for and by, where that differs between nodes; empty where it does not."""
    found = {node.compiles: node.name for node in reversed(nodes) if node.compiles is not None}
    return (
        ", ".join(f"{name}: {compiles}" for compiles, name in reversed(found.items()))
        if len(found) > 1
        else ""
    )


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


def linear_in(mlx: str) -> bool:
    """Whether this version of MLX has the backward of causal attention on Metal whose memory is linear in the width."""
    numbers = re.findall(r"\d+", mlx)[:3]
    return tuple(map(int, numbers)) >= (0, 32, 4)


_LINEAR = linear_in(version("mlx"))


def _has_metal(node: Node) -> bool:
    """Whether a node is known to compute on Apple's GPU; a hostfile says so by its chip, such as chip=M3-Ultra."""
    return (node.chip or "").startswith(("Apple", "M1", "M2", "M3", "M4", "M5"))


def _is_cpu(node: Node) -> bool:
    """Whether a node was asked and computes on a CPU."""
    return node.measured and node.compiles is None and node.chip is None


def _on_cpus(nodes: Sequence[Node]) -> bool:
    """Whether all nodes compute on CPUs, as far as is known: on others some things are off until a Mac has run them."""
    return all(_is_cpu(n) or (not n.measured and chip_of(n) is CPU) for n in nodes)


def _running_ahead(plan: RunPlan, with_work: Callable[[Workload], RunPlan], *, only_free: bool) -> RunPlan:
    """`plan` with a main thread that runs ahead of the device, where that leaves headroom; `only_free`: and where no
    node needs more for it."""
    ahead = with_work(replace(plan.work, run_ahead=True))
    free = all(a.peak <= b.peak for a, b in zip(ahead.ledgers, plan.ledgers, strict=True))
    return ahead if ahead.comfortable and (free or not only_free) else plan


def keeps_products(recipe: Recipe, nodes: Sequence[Node]) -> bool:
    """Whether spare memory may keep results of recomputed layers; unless asked for, on CPUs alone."""
    asked = recipe.memory.keep_products
    allowed = _on_cpus(nodes) if asked == "auto" else asked
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


def _longest_tail(none: RunPlan, with_work: Callable[[Workload], RunPlan]) -> RunPlan:
    """The plan with the longest un-recomputed tail that leaves headroom, else `none` (that without a tail).

    With many micro-batches a longer tail may need less, for it keeps no inputs, so where `none` does not fit a few
    lengths are tried first. What is needed is nearly convex in the length: above one that fits lies one border.
    """

    def with_tail(unrecomputed: int) -> RunPlan:
        return with_work(replace(none.work, unrecomputed=unrecomputed))

    layers = len(none.shards.units) - 1
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


def _shared(
    recipe: Recipe,
    spec: ModelSpec,
    nodes: Sequence[Node],
    stage: int,
    state_bytes: StateBytes,
    work: Workload,
) -> RunPlan:
    """The plan at one stage, with shares as the recipe asks: what a node needs beside its shard is subtracted. Where
    the nodes together lack memory, shares by memory make all of them overfull alike.
    """
    limits = tuple(int(n.limit_bytes or 0) for n in nodes)
    ranks = range(len(nodes))
    shards = make_plan(spec.units, [1.0] * len(nodes), stage)
    ledgers = tuple(ledger(spec, shards, work, r, state_bytes) for r in ranks)
    listed = not isinstance(recipe.memory.shares, str)  # checked on one node too
    if listed or (recipe.memory.shares == "memory" and len(nodes) > 1):
        by_phase = {phase: [_sharded(one, phase, stage) for one in ledgers] for phase in ledgers[0].phases}
        whole = max(map(sum, by_phase.values()))
        # Equal shares differ by a tensor's end and by which unit is whose in a phase, which unequal ones would move.
        equal = {phase: max(sizes) for phase, sizes in by_phase.items()}

        def rooms(stretch: float) -> list[float]:
            return [_room(one, stretch * n, equal, stage) for one, n in zip(ledgers, limits, strict=True)]

        stretch = _least_stretch(lambda s: sum(max(room, 0) for room in rooms(s)) >= len(nodes))
        stretched = [int(stretch * limit) for limit in limits]
        fixed = [n - int(whole * room) for n, room in zip(stretched, rooms(stretch), strict=True)]
        shards = make_plan(spec.units, solve_shares(recipe.memory.shares, stretched, fixed), stage)
        ledgers = tuple(ledger(spec, shards, work, r, state_bytes) for r in ranks)
    return RunPlan(shards, work, ledgers, limits)


def _least_stretch(holds: Callable[[float], bool]) -> float:
    """How many times as large all limits would have to be to hold a step; 1 where they do."""
    low, high = 1.0, 1.0
    while not holds(high) and high < MOST_STRETCH:
        low, high = high, 2 * high
    while high - low > FINE_STRETCH:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _room(one: Ledger, limit: float, equal: Mapping[str, int], stage: int) -> float:
    """How large a rank's share could be, in the units of `equal` shares, in the phase that allows the least."""
    room = []
    for phase, items in one.phases.items():
        fixed = sum(one.resident.values()) + sum(items.values()) - _sharded(one, phase, stage)
        if equal[phase]:
            room.append((limit - fixed) / equal[phase])
    return min(room, default=1.0)


def _sharded(one: Ledger, phase: str, stage: int) -> int:
    """What a rank needs in a phase in proportion to its share: below stage 3 the weights are no part of it."""
    items = {**one.resident, **one.phases[phase]}
    return sum(
        size
        for name, size in items.items()
        if name == "gradients"
        or (name.startswith("optimizer ") and name != "optimizer chunk")
        or (name in ("weights", "adapters") and stage == 3)
    )


def _busiest_card(plan: RunPlan) -> int:
    return max(max(pair) for pair in card_bytes(step_traffic(plan.shards, plan.work)))


def _overload(plan: RunPlan) -> float:
    """What the fullest rank needs, in units of what it may use."""
    return max(one.peak / max(limit, 1) for one, limit in zip(plan.ledgers, plan.limits, strict=True))
