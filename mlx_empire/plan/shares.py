"""Who holds how much: one plan at a given ZeRO stage and step shape, with shares as the recipe asks.

`memory` gives each rank what it may use less what it needs whatever its share; which stage and which step, `resolve`
chooses among these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mlx_empire.cluster.hostfile import Node
from mlx_empire.errors import UserError
from mlx_empire.model.spec import ModelSpec
from mlx_empire.plan.memory import Ledger, ledger
from mlx_empire.plan.optimizer_bytes import StateBytes
from mlx_empire.plan.shards import ShardPlan, make_plan
from mlx_empire.plan.workload import Workload
from mlx_empire.recipe.schema import Recipe

TIGHT_HEADROOM = 0.05  # of the limit; less is called tight
MOST_STRETCH, FINE_STRETCH = 2.0**20, 0.001  # of limits that hold no step


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


def plan_at_stage(
    recipe: Recipe,
    spec: ModelSpec,
    nodes: Sequence[Node],
    state_bytes: StateBytes,
    stage: int,
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
