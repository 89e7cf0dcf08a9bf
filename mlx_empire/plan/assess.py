"""Whether a model fits: the resolved plan of a recipe on given nodes, held against each node's three limits.

Decides the verdict of a node: `no` where its peak passes what the GPU may use, its largest array the buffer limit,
or its arrays the number of live buffers; `tight` where less than 5 % of the limit is left; else `fits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_empire.cluster.hostfile import Node
from mlx_empire.model.spec import ModelSpec
from mlx_empire.plan.limits import largest_array, live_buffers
from mlx_empire.plan.memory import Ledger
from mlx_empire.plan.optimizer_bytes import StateBytes, StatesOf
from mlx_empire.plan.resolve import TIGHT_HEADROOM, RunPlan, resolve
from mlx_empire.recipe.schema import Recipe

MOST_LIVE_BUFFERS = 499_000  # Metal's; MLX stops there
BUFFER_FRACTION = 0.75  # largest buffer, of the GPU's working set
VERDICTS = ("fits", "tight", "no")  # best first


@dataclass(frozen=True)
class NodeAssessment:
    """One rank's ledger against its limits. Sizes in bytes; `reason` is one sentence when not `fits`."""

    node: Node
    share: float
    ledger: Ledger
    limit_bytes: int
    largest_array_bytes: int
    buffer_limit_bytes: int
    live_buffers: int
    verdict: str
    reason: str

    @property
    def peak_bytes(self) -> int:
        """What the node needs at the worst moment of a step."""
        return self.ledger.peak

    @property
    def headroom_bytes(self) -> int:
        """What is left of the limit at that moment; negative where it does not fit."""
        return self.limit_bytes - self.ledger.peak


@dataclass(frozen=True)
class Assessment:
    """A recipe's plan on nodes and what each node says to it.

    `spec`: the model as it is tuned; `states_of`: what answers for the optimizer, also of a changed recipe.
    """

    spec: ModelSpec
    recipe: Recipe
    plan: RunPlan
    nodes: tuple[NodeAssessment, ...]
    states_of: StatesOf

    @property
    def verdict(self) -> str:
        """That of the worst node."""
        return max((n.verdict for n in self.nodes), key=VERDICTS.index)

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage of the plan."""
        return self.plan.shards.zero_stage

    @property
    def worst(self) -> NodeAssessment:
        """The node with the worst verdict and, among those, the least relative headroom."""
        return max(
            self.nodes, key=lambda n: (VERDICTS.index(n.verdict), n.peak_bytes / max(n.limit_bytes, 1))
        )


def assess(recipe: Recipe, spec: ModelSpec, nodes: Sequence[Node], states_of: StatesOf) -> Assessment:
    """Resolve `recipe` on `nodes` and hold it against their limits."""
    sizes = states_of(recipe.optimizer)
    plan = resolve(recipe, spec, nodes, sizes)
    assessed = tuple(_node(spec, plan, r, n, sizes) for r, n in enumerate(nodes))
    return Assessment(spec, recipe, plan, assessed, states_of)


def _node(spec: ModelSpec, plan: RunPlan, rank: int, node: Node, sizes: StateBytes) -> NodeAssessment:
    ledger, limit = plan.ledgers[rank], plan.limits[rank]
    array, what = largest_array(spec, plan.shards, plan.work, rank)
    buffer_limit = int(BUFFER_FRACTION * limit)
    buffers = live_buffers(spec, plan.shards, plan.work, rank, sizes)
    verdict, reason = "fits", ""
    if ledger.peak > limit:
        name, size = max(ledger.items().items(), key=lambda kv: kv[1])
        need = f"needs {_gib(ledger.peak)} and may use {_gib(limit)}"
        verdict, reason = "no", f"{need}; {name} alone take {_gib(size)}"
    elif array > buffer_limit:
        verdict = "no"
        reason = f"{what} takes {_gib(array)}, and no array may pass {_gib(buffer_limit)}"
    elif buffers > MOST_LIVE_BUFFERS:
        verdict, reason = "no", f"{buffers:,} arrays are alive at once, and {MOST_LIVE_BUFFERS:,} may be"
    elif limit - ledger.peak < TIGHT_HEADROOM * limit:
        left = limit - ledger.peak
        verdict, reason = "tight", f"only {100 * left / limit:.1f} % ({_gib(left)}) of {_gib(limit)} is left"
    return NodeAssessment(
        node, plan.shards.shares[rank], ledger, limit, array, buffer_limit, buffers, verdict, reason
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
