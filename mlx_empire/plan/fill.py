"""How much of what layers would compute again is kept on each rank: as much as its memory has room for.

Every rank decides by its own ledger, for what is kept moves nothing between ranks; shares, stage and tail stay what
they are. Where bits are strict one choice holds for all micro-batches of all ranks, so that it can be noted and taken
again by other ranks: as much as the fullest has room for, which is seldom less on the rank that all wait for. What it
buys is counted in operations of the rank that has most to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlx_empire.model.spec import ModelSpec
from mlx_empire.plan.actions import NOTHING, Stash
from mlx_empire.plan.kept import Order, order_of
from mlx_empire.plan.memory import Ledger, ledger
from mlx_empire.plan.optimizer_bytes import StateBytes
from mlx_empire.plan.shards import ShardPlan
from mlx_empire.plan.step_bytes import KEPT
from mlx_empire.plan.work import step_flops
from mlx_empire.plan.workload import Workload
from mlx_empire.sizes import amount


@dataclass(frozen=True)
class Recomputation:
    """What a run notes of its plan where bits are strict: so many last layers keep their activations; of the others
    these products stay, by unit, for every micro-batch."""

    unrecomputed: int
    kept: Order = ()

    @classmethod
    def of(cls, work: Workload) -> Recomputation | None:
        """None where bits are not strict: each start chooses anew."""
        if not work.strict:
            return None
        busy = next(r for r in range(work.layout.world_size) if work.micro_batches(r))
        stash = work.stash(busy)
        return cls(work.unrecomputed, stash.order[: stash.visits // work.micro_batches(busy)])

    def put_into(self, work: Workload, layers: int, *, keeps: bool) -> Workload:
        """`work` with this choice, for a model of so many layers; `keeps`: whether products may stay at all."""
        stashes = _alike(self.kept if keeps else (), work)
        return replace(work, unrecomputed=min(self.unrecomputed, layers), stashes=stashes)


def fill(
    spec: ModelSpec,
    plan: ShardPlan,
    work: Workload,
    ledgers: Sequence[Ledger],
    most: Sequence[int],
    state_bytes: StateBytes,
) -> tuple[Workload, tuple[Ledger, ...]]:
    """`work` with what each rank keeps, and the ranks' ledgers then; by rank `most` bytes may be needed.

    The ledger grows with what is kept but for a layer's own need, so of the counts that are tried the largest stays.
    Where `work.strict`, of the ranks' choices what all of them keep for every micro-batch.
    """
    order = order_of(spec, work, plan.trained)
    if not order:
        return work, tuple(ledgers)
    if work.strict:  # one by one, for each stays for all micro-batches or for none
        order = tuple((u, (number,)) for u, numbers in order for number in numbers)
    found: list[Ledger] = []
    stashes: list[Stash] = []
    for rank, best in enumerate(ledgers):
        low, high = 0, len(order) * work.micro_batches(rank) + 1
        middle = high - 1  # all of it, or a search for how much
        while high - low > 1:
            stash = Stash(order, middle)
            tried = ledger(spec, plan, replace(work, stashes=(NOTHING,) * rank + (stash,)), rank, state_bytes)
            if tried.peak <= most[rank]:
                low, best = middle, tried
            else:
                high = middle
            middle = (low + high) // 2
        found.append(best)
        stashes.append(Stash(order, low) if low else NOTHING)
    if not work.strict:
        return replace(work, stashes=tuple(stashes) if any(s.visits for s in stashes) else ()), tuple(found)
    busy = [r for r in range(len(ledgers)) if work.micro_batches(r)]
    all_keep = min(stashes[r].visits // work.micro_batches(r) for r in busy)
    filled = replace(work, stashes=_alike(_by_unit(order[:all_keep]), work))
    return filled, tuple(ledger(spec, plan, filled, r, state_bytes) for r in range(len(ledgers)))


def _by_unit(order: Order) -> Order:
    units = dict.fromkeys(u for u, _ in order)
    return tuple((unit, tuple(sorted(n for u, own in order if u == unit for n in own))) for unit in units)


def _alike(kept: Order, work: Workload) -> tuple[Stash, ...]:
    """By rank: the products in `kept` stay, of each layer for every micro-batch; empty where there are none."""
    if not kept:
        return ()
    ranks = range(work.layout.world_size)
    return tuple(Stash(kept, len(kept) * work.micro_batches(rank)) for rank in ranks)


def most_operations(spec: ModelSpec, plan: ShardPlan, work: Workload) -> float:
    """Of a step, on the rank that has most to compute."""
    return max(step_flops(spec, plan, work, rank) for rank in range(plan.world_size))


def bought(spec: ModelSpec, plan: ShardPlan, work: Workload, ledgers: Sequence[Ledger]) -> str:
    """What spare memory buys, such as "3.2 GiB of products for 9.1 % fewer operations"; empty where nothing."""
    if not work.stashes:
        return ""
    size = max(phase.get(KEPT, 0) for one in ledgers for phase in one.phases.values())
    before, after = (most_operations(spec, plan, w) for w in (replace(work, stashes=()), work))
    return f"{amount(size)} of products for {100 * (1 - after / before):.1f} % fewer operations"
