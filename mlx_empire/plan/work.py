"""How much a step computes and moves: operations, bytes of memory and bytes per wire, as functions of the plan.

Operations are executed ones, recomputation counted: 2 per weight and token in a forward pass, 2 more for the
gradient by the input, 2 for the gradient by a weight that trains, 2 for a recomputed forward, less what of it was kept
and what nothing reads, such as a layer's last product (`kept.never_again`). So full fine-tuning executes 8 per active
parameter and token with recomputation, or somewhat less (Scout 7.5), and 6 without; LoRA about 6 and 4. Attention adds
2 x heads x (key + value channels) per position attended to, once per such pass; masked positions are counted, for
array masks compute them. Attention in blocks computes fewer, and a kept result of it is counted as the blocks that it
saves: so in long rows the choice between a tail and kept products leans to the tail. The embedding counts as if it were
a product, so figures are up to 7 % high for 8 B and below 1 % for 70 B models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from mlx_empire.model.attention.segments import SHORT
from mlx_empire.model.closed_forms import experts, is_stacked
from mlx_empire.model.kept import ATTENTION
from mlx_empire.model.spec import ITEM_BYTES, ModelSpec, UnitSpec, is_adapter
from mlx_empire.plan.actions import Action, Reader, StepShape
from mlx_empire.plan.activations import hidden_bytes
from mlx_empire.plan.hardware import Wire
from mlx_empire.plan.kept import never_again, saved_operations
from mlx_empire.plan.schedule import folded_step
from mlx_empire.plan.shards import ShardPlan
from mlx_empire.plan.traffic import Route
from mlx_empire.plan.workload import Workload, step_shape

if TYPE_CHECKING:
    from mlx_empire.plan.assess import Assessment


def flops_per_token(spec: ModelSpec, work: Workload) -> float:
    """Executed operations per token of a training step, a mean over the micro-batches of all ranks."""
    trained = tuple(any(t.trainable for t in u.tensors) for u in spec.units)
    ranks = range(len(work.stashes))
    cells = [tuple(map(len, work.layout.of_rank(r))) for r in ranks] or [(1,)]
    operations = 0.0
    for rank, own in enumerate(cells):
        shape = StepShape(3, trained, own, work.unrecomputed, stash=work.stash(rank), embeds=work.embeds)
        reader = StepFlops(spec, work, shape)
        reader.play(folded_step(shape))
        operations += reader.total
    return operations / sum(map(sum, cells))


class UnitFlops(NamedTuple):
    """Operations per token of a unit: a forward pass, the gradients by input and weights, and what of the forward a
    recomputing backward computes again."""

    forward: float
    gradients: float
    again: float

    @property
    def backward(self) -> float:
        """Of a vjp that recomputes."""
        return self.again + self.gradients


def executed_flops(spec: ModelSpec, work: Workload, positions: int, rows: int) -> float:
    """Operations of a step of so many `rows` with so many `positions` together, padding included.

    What kept products save a token is asked for at the plan's width: a product saves as much at any other, attention in
    proportion to the width, and nothing in short rows, which are not attended to in blocks.
    """
    width = max(positions // rows, 1)
    each = flops_per_token(spec, replace(work, stashes=(), width=width))
    if work.stashes:
        products, attention = _saved_per_token(spec, work)
        each -= products + (attention * width / work.width if width > SHORT else 0.0)
    return positions * each


def _saved_per_token(spec: ModelSpec, work: Workload) -> tuple[float, float]:
    """What kept results of products and of attention save, at the plan's width."""
    question = "kept products save", work
    if question not in spec.known:
        without = tuple(
            replace(s, order=tuple((u, tuple(n for n in own if n != ATTENTION)) for u, own in s.order))
            for s in work.stashes
        )
        none, products, both = (
            flops_per_token(spec, replace(work, stashes=stashes)) for stashes in ((), without, work.stashes)
        )
        spec.known[question] = none - products, products - both
    found: tuple[float, float] = spec.known[question]
    return found


def unit_flops(spec: ModelSpec, work: Workload) -> list[UnitFlops]:
    """By unit; of stacked experts those that a token is sent to. The root's pass is the head's and the embedding's."""
    total, chosen = experts(spec.text_config)
    scores = attention_flops(spec, work.width)
    found = []
    for unit in spec.units:
        active = trained = 0.0
        for t in unit.tensors:
            parameters = t.parameters / total * chosen if is_stacked(t, total) else t.parameters
            active += 0 if is_adapter(t.name) else parameters
            trained += parameters if t.trainable else 0
        layer = unit is not spec.units[0]
        own = scores if layer and attends(unit) else 0.0
        forward, spared = 2 * active + own, never_again(unit, spec, work) if layer else 0.0
        found.append(UnitFlops(forward, 2 * active + 2 * trained + 2 * own, forward - spared))
    return found


def head_flops(units: Sequence[UnitFlops], shape: StepShape) -> float:
    """Operations per token of head, embedding and un-recomputed layers; of those that nothing below trains a pass."""
    kept = range(shape.boundary + 1, shape.layers + 1)
    root = units[0].forward + units[0].gradients
    return root + sum(units[u].forward + units[u].gradients * (u >= shape.lowest) for u in kept)


class StepFlops(Reader):
    """Counts the operations of a step per token of a micro-batch: plays the actions of `schedule`."""

    def __init__(self, spec: ModelSpec, work: Workload, shape: StepShape) -> None:
        self._units, self._saved = unit_flops(spec, work), partial(saved_flops, spec, work)
        self._head = head_flops(self._units, shape)
        self.total = 0.0

    def forward(self, action: Action) -> None:
        """A layer that will be recomputed."""
        self.total += action.times * self._units[action.unit].forward

    def head(self, action: Action) -> None:
        """Head and embedding, and the un-recomputed layers."""
        self.total += action.times * self._head

    def backward(self, action: Action) -> None:
        """A layer, recomputed but for what was kept."""
        self.total += action.times * (self._units[action.unit].backward - self._saved(action))

    stash, reuse = forward, backward
    gather = bind = free = capture = score = embed = Reader.nothing
    keep = reduce = settle = replicate = norm = update = renew = adopt = Reader.nothing
    offload = evict = prefetch = fetch = Reader.nothing


def saved_flops(spec: ModelSpec, work: Workload, action: Action) -> float:
    """Operations per token of what a layer's backward finds and need not compute."""
    return saved_operations(spec.units[action.unit], action.products, spec, work) / work.tokens


def attends(unit: UnitSpec) -> bool:
    """Whether a layer attends: it has a module called so (`self_attn`, `attention`), unlike state-space ones."""
    return any("attn" in t.name or "attention" in t.name for t in unit.tensors)


def attention_layers(spec: ModelSpec) -> int:
    """How many layers attend."""
    return sum(attends(u) for u in spec.units[1:])


def attention_flops(spec: ModelSpec, width: int) -> float:
    """Operations per token of one attending layer's scores and mix in a forward pass."""
    text = spec.text_config
    heads = int(text.get("num_attention_heads") or text.get("n_head") or 0)
    if not heads:
        return 0.0
    hidden = int(text.get("hidden_size") or text.get("n_embd") or 0)
    plain = int(text.get("head_dim") or hidden // heads)
    keys = int(text.get("qk_nope_head_dim") or 0) + int(text.get("qk_rope_head_dim") or 0)
    return 2.0 * heads * width * ((keys or plain) + int(text.get("v_head_dim") or plain))


def step_flops(spec: ModelSpec, plan: ShardPlan, work: Workload, rank: int) -> float:
    """Operations of `rank` in a step."""
    shape = step_shape(plan, work, rank)
    reader = StepFlops(spec, work, shape)
    reader.play(folded_step(shape))
    return work.tokens * reader.total


def whole_weights(assessment: Assessment) -> int:
    """Bytes of all weights as gathered."""
    return sum(u.gathered_bytes for u in assessment.plan.shards.units)


def update_memory_traffic(assessment: Assessment, rank: int) -> list[float]:
    """By unit, bytes that the optimizer of `rank` moves: weights and states read and written, gradients read."""
    plan = assessment.plan
    item = ITEM_BYTES[plan.work.gradient_dtype]
    states = sum(s for n, s in plan.ledgers[rank].resident.items() if n.startswith("optimizer"))
    each = 2 * states / max(sum(size.trained for size in plan.shards.sizes[rank]), 1)
    moved = []
    for unit, size in zip(plan.shards.units, plan.shards.sizes[rank], strict=True):
        weights = 0
        for segment in unit.segments:
            if segment.kind != "frozen":
                a, b = plan.shards.state_interval(segment, rank)
                weights += (b - a) * (2 * segment.itemsize + item)
        moved.append(weights + each * size.trained)
    return moved


class ChipCosts:
    """`step_time.Costs` of one rank, from what its chip does: FLOP/s executed, bytes/s of memory, of adding and of its
    disk, which ranks of one machine share."""

    def __init__(
        self,
        assessment: Assessment,
        rank: int,
        flops: float,
        memory_rate: float,
        adding: float,
        disk_rate: float,
    ) -> None:
        plan, work = assessment.plan, assessment.plan.work
        self._flops, self._memory_rate, self._adding = flops, memory_rate, adding
        name = assessment.nodes[rank].node.name
        sharing = sum(one.node.name == name for one in assessment.nodes)
        self._input_seconds = sharing * hidden_bytes(assessment.spec, work) / disk_rate
        self._tokens, self._units = work.tokens, unit_flops(assessment.spec, work)
        self._bytes = [u.gathered_bytes for u in plan.shards.units]
        self._saved = partial(saved_flops, assessment.spec, work)
        self._updates = update_memory_traffic(assessment, rank)
        shape = step_shape(plan.shards, work, rank)
        self._head = head_flops(self._units, shape)
        kept = range(shape.boundary + 1, shape.layers + 1)
        self._head_bytes = (
            sum(self._bytes[u] * (3 if u >= shape.lowest else 1) for u in kept) + 3 * self._bytes[0]
        )

    def compute(self, action: Action) -> float:
        """A pass takes its arithmetic, or the reading of its weights where there are too few tokens."""
        u, times = action.unit, action.times
        if action.kind == "update":
            return self._updates[u] / self._memory_rate
        if action.kind in ("forward", "stash"):
            return times * self._pass(self._units[u].forward, self._bytes[u])
        if action.kind in ("backward", "reuse"):
            return times * self._pass(self._units[u].backward - self._saved(action), 2 * self._bytes[u])
        if action.kind == "head":
            return times * self._pass(self._head, self._head_bytes)
        return 0.0  # the embedding's part is counted with the head

    def add(self, nbytes: int) -> float:
        """Contributions are added by one thread."""
        return nbytes / self._adding

    def disk(self, action: Action) -> float:
        """A layer's input of a micro-batch, written or read."""
        return action.times * self._input_seconds

    def _pass(self, flops: float, nbytes: float) -> float:
        return max(self._tokens * flops / self._flops, nbytes / self._memory_rate)


def trained_bytes(assessment: Assessment) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer states that the training needs once, on however many machines."""
    plan = assessment.plan
    item = ITEM_BYTES[plan.work.gradient_dtype]
    sizes = [s.size for u in plan.shards.units for s in u.segments if s.kind != "frozen"]
    ranks = range(len(plan.ledgers)) if plan.shards.zero_stage else range(1)
    states = sum(
        size for r in ranks for name, size in plan.ledgers[r].resident.items() if name.startswith("optimizer")
    )
    return {"weights": whole_weights(assessment), "gradients": item * sum(sizes), "optimizer": states}


def route_over(wire: Wire, route: Route) -> Route:
    """The way a gather takes over `wire`: `auto` is direct where each pair of nodes has its own cable."""
    return "direct" if route == "auto" and wire.per == "pair" else route
