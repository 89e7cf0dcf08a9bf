"""What is said of a plan that does not fit: the worst node, what it needs, and what could be changed."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_empire.cluster.hostfile import Node
from mlx_empire.errors import DoesNotFitError
from mlx_empire.plan.shares import RunPlan
from mlx_empire.sizes import amount

WORTH_A_FILE = 0.1  # of the peak, that layers' inputs take


def require_fit(plan: RunPlan, nodes: Sequence[Node], more: str = "") -> None:
    """DoesNotFitError naming the worst node, what it needs and what could be changed; `more`: a remedy of hardware."""
    if plan.fits:
        return
    pairs = list(zip(plan.ledgers, plan.limits, strict=True))
    worst = max(range(len(pairs)), key=lambda i: pairs[i][0].peak / max(pairs[i][1], 1))
    raise DoesNotFitError(
        f"{nodes[worst].name} (rank {worst}) needs {needs_in_words(plan, worst)}; "
        f"{_remedies(plan)}{more and f', {more}'}"
    )


def needs_in_words(plan: RunPlan, rank: int) -> str:
    """`12.0 GiB and may use 8.0 GiB at ZeRO stage 3 (largest: ...)`."""
    need, limit = plan.ledgers[rank], plan.limits[rank]
    largest = sorted(need.items().items(), key=lambda kv: -kv[1])[:3]
    parts = ", ".join(f"{name} {amount(size)}" for name, size in largest)
    return (
        f"{amount(need.peak)} and may use {amount(limit)} at ZeRO stage {plan.shards.zero_stage} "
        f"(largest: {parts})"
    )


def _remedies(plan: RunPlan) -> str:
    """What could be changed, without what is so already."""
    inputs = max(one.items().get("layer inputs", 0) / max(one.peak, 1) for one in plan.ledgers)
    done = any("codes" in name for name in plan.ledgers[0].resident)
    options = [
        ("memory.zero_stage: 3", plan.shards.zero_stage < 3),
        ("memory.gradient_checkpointing: true", plan.work.unrecomputed > 0),
        ("optimizer.state_bits: 8", not done),
        ("memory.activation_offload: true", not plan.work.offload and inputs > WORTH_A_FILE),
        ("a shorter data.sequence_length", True),
        ("another node", True),
    ]
    return "try " + ", ".join(text for text, open_to in options if open_to)
