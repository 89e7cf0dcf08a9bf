"""How much of what layers would compute again is kept on each rank: as much as its memory has room for.

Every rank decides by its own ledger, for what is kept moves nothing between ranks and changes no bit; shares, stage and
tail stay what they are. What it buys is counted in operations of the rank that has most to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlx_empire.model.spec import ModelSpec
from mlx_empire.plan.actions import NOTHING, Stash
from mlx_empire.plan.kept import order_of
from mlx_empire.plan.memory import Ledger, ledger
from mlx_empire.plan.optimizer_bytes import StateBytes
from mlx_empire.plan.shards import ShardPlan
from mlx_empire.plan.step_bytes import KEPT
from mlx_empire.plan.work import step_flops
from mlx_empire.plan.workload import Workload
from mlx_empire.sizes import amount


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
    """
    order = order_of(spec, work, plan.trained)
    if not order:
        return work, tuple(ledgers)
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
    return replace(work, stashes=tuple(stashes) if any(s.visits for s in stashes) else ()), tuple(found)


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
