"""Whether a model fits: the resolved plan of a recipe on given nodes, held against each node's three limits.

Decides the verdict of a node: `no` where its peak passes what the GPU may use, its largest array the buffer limit,
or its arrays the number of live buffers; `tight` where less than 5 % of the limit is left; else `fits`.

Two of the limits are how large its largest array is, and how many it holds at once. Metal refuses a buffer above
three quarters of the working set and more than 499,000 live buffers. Both counts follow from the plan; neither can be
measured on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_empire.cluster.hostfile import Node
from mlx_empire.model.spec import BLOCK, ModelSpec
from mlx_empire.plan.activations import attention_scores, widest_activation
from mlx_empire.plan.memory import Ledger
from mlx_empire.plan.optimizer_bytes import StateBytes, StatesOf
from mlx_empire.plan.resolve import resolve
from mlx_empire.plan.shards import Segment, ShardPlan
from mlx_empire.plan.shares import TIGHT_HEADROOM, RunPlan
from mlx_empire.plan.workload import Workload, chunk_tokens
from mlx_empire.recipe.schema import Recipe
from mlx_empire.sizes import amount

_IN_FLIGHT = 2000  # arrays of one layer's graph and of the model's own making


def largest_array(spec: ModelSpec, plan: ShardPlan, work: Workload, rank: int) -> tuple[int, str]:
    """(bytes, what it is) of the largest single array that `rank` makes in a step."""
    vocabulary = int(spec.text_config.get("vocab_size") or 0)
    chunk = min(chunk_tokens(vocabulary, frozen=spec.frozen_root), work.tokens)
    found = [
        (4 * chunk * vocabulary, "a chunk of logits"),
        (attention_scores(spec, work), "the attention scores of a layer"),
        (max(widest_activation(u, spec, work) for u in spec.units[1:]), "a layer's widest activation"),
    ]
    for unit in plan.units:
        for segment in unit.segments:
            found.append((segment.size * segment.itemsize, f"the weights of {unit.name} ({segment.kind})"))
            if segment.kind != "frozen":
                a, b = plan.state_interval(segment, rank)
                found.append((4 * (b - a), f"the gradient of {unit.name} ({segment.kind})"))
    largest = max((t for t in spec.units[0].tensors if t.trainable), key=lambda t: t.size, default=None)
    if largest is not None and work.tokens > chunk:
        found.append((4 * largest.size, f"the fp32 gradient of {largest.name}"))
    return max(found)


def live_buffers(spec: ModelSpec, plan: ShardPlan, work: Workload, rank: int, state_bytes: StateBytes) -> int:
    """How many arrays `rank` holds at once: the chunks' weights and states, gradients, layer inputs."""
    count = _IN_FLIGHT + 4 * max(len(u.tensors) for u in spec.units)
    micros = work.micro_batches(rank)
    passing = min(micros, work.wave or micros)
    inputs = 0 if work.offload else len(plan.units) - work.unrecomputed
    count += passing * (inputs + 4)
    count += (
        work.stash(rank).arrays(micros) * passing // max(micros, 1)
    )  # in waves all micro-batches keep the same
    for unit in plan.units:
        for segment in unit.segments:
            count += 1  # the whole buffer, or the gradient
            if segment.kind == "frozen":
                count += (
                    0 if plan.zero_stage < 3 else chunk_count(segment, *plan.weights_interval(segment, rank))
                )
                continue
            arrays = len(state_bytes(BLOCK, segment.dtype, quantised=segment.kind == "trainable"))
            own = 1 if plan.zero_stage == 3 else 0  # below stage 3 chunks are views of the whole buffer
            count += 1 + (arrays + own) * chunk_count(segment, *plan.state_interval(segment, rank))
    return count


def cache_bound(limit: int, peak: int) -> int:
    """Bytes of freed buffers that MLX keeps for reuse: what the plan leaves over, and never more than the peak.

    Rows of many lengths leave buffers of many sizes, which nothing takes up again; without a bound they fill the limit.
    """
    return min(max(limit - peak, LEAST_CACHE_BYTES), peak)


def chunk_count(segment: Segment, start: int, stop: int) -> int:
    """The number of chunks of [start, stop)."""
    return sum(run.times for run in segment.runs(start, stop))


MOST_LIVE_BUFFERS = 499_000  # Metal's; MLX stops there
LEAST_CACHE_BYTES = (
    1 << 28
)  # where a plan leaves less over: without a cache every buffer is asked of the system
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
    def cache_bound_bytes(self) -> int:
        """What MLX may keep of freed buffers besides."""
        return cache_bound(self.limit_bytes, self.ledger.peak)

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
    plan = resolve(recipe, spec, nodes, states_of(recipe.optimizer))
    return assess_plan(recipe, plan, spec, nodes, states_of)


def assess_plan(
    recipe: Recipe, plan: RunPlan, spec: ModelSpec, nodes: Sequence[Node], states_of: StatesOf
) -> Assessment:
    """Hold a recipe's resolved plan against the limits of its `nodes`."""
    sizes = states_of(recipe.optimizer)
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
        need = f"needs {amount(ledger.peak)} and may use {amount(limit)}"
        verdict, reason = "no", f"{need}; {name} alone take {amount(size)}"
    elif array > buffer_limit:
        verdict = "no"
        reason = f"{what} takes {amount(array)}, and no array may pass {amount(buffer_limit)}"
    elif buffers > MOST_LIVE_BUFFERS:
        verdict, reason = "no", f"{buffers:,} arrays are alive at once, and {MOST_LIVE_BUFFERS:,} may be"
    elif limit - ledger.peak < TIGHT_HEADROOM * limit:
        left = limit - ledger.peak
        verdict, reason = (
            "tight",
            f"only {100 * left / limit:.1f} % ({amount(left)}) of {amount(limit)} is left",
        )
    return NodeAssessment(
        node, plan.shards.shares[rank], ledger, limit, array, buffer_limit, buffers, verdict, reason
    )
