"""How much a step computes and moves: operations, bytes of memory and bytes per wire, as functions of the plan.

Operations are executed ones, recomputation counted: 2 per weight and token in a forward pass, 2 more for the
gradient by the input, 2 for the gradient by a weight that trains, 2 for a recomputed forward. So full fine-tuning
executes 8 per active parameter and token with recomputation and 6 without; LoRA about 6 and 4. Attention adds
2 x heads x (key + value channels) per position attended to, once per such pass; masked positions are counted, for
array masks compute them. The embedding counts as if it were a product, so figures are up to 7 % high for 8 B and
below 1 % for 70 B models.
"""

from __future__ import annotations

from mlx_empire.plan.assess import Assessment
from mlx_empire.plan.hardware import Wire
from mlx_empire.plan.model import ITEM_BYTES, ModelSpec, UnitSpec, is_adapter
from mlx_empire.plan.subject import Subject
from mlx_empire.plan.traffic import Matrix, Route, card_bytes
from mlx_empire.plan.workload import Workload


def flops_per_token(subject: Subject, work: Workload) -> float:
    """Executed operations per token of a training step."""
    spec, active = subject.spec, float(subject.active_parameters)
    layers = len(spec.units) - 1
    recomputed = (layers - work.tail) / layers
    trained = active * min(1.0, spec.trainable_parameters / subject.base_parameters)
    root = min(_weights(spec.units[0]), active)
    weights = 4 * active + 2 * trained + 2 * recomputed * (active - root)
    return weights + (3 + recomputed) * attention_layers(spec) * attention_flops(spec, work.width)


def _weights(unit: UnitSpec) -> int:
    """Weights of a unit's base."""
    return sum(t.parameters for t in unit.tensors if not is_adapter(t.name))


def attention_layers(spec: ModelSpec) -> int:
    """How many layers attend: those with a module called so (`self_attn`, `attention`), unlike state-space ones."""
    return sum(any("attn" in t.name or "attention" in t.name for t in u.tensors) for u in spec.units[1:])


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


def step_flops(assessment: Assessment, rank: int) -> float:
    """Operations of `rank` in a step."""
    work = assessment.plan.work
    return work.micro_batches(rank) * work.tokens * flops_per_token(assessment.subject, work)


def weight_bytes_read(assessment: Assessment, rank: int) -> float:
    """Bytes of weights that `rank` reads in a step: each micro-batch passes every layer three times."""
    return 3.0 * assessment.plan.work.micro_batches(rank) * whole_weights(assessment)


def whole_weights(assessment: Assessment) -> int:
    """Bytes of all weights as gathered."""
    return sum(u.gathered_bytes for u in assessment.plan.shards.units)


def update_bytes(assessment: Assessment, rank: int) -> int:
    """Bytes that the optimizer of `rank` moves: weights and states read and written, gradients read."""
    plan = assessment.plan
    item = ITEM_BYTES[plan.work.gradient_dtype]
    moved = 0
    for unit in plan.shards.units:
        for segment in unit.segments:
            if segment.kind != "frozen":
                a, b = plan.shards.state_interval(segment, rank)
                moved += (b - a) * (2 * segment.itemsize + item)
    states = sum(s for n, s in plan.ledgers[rank].resident.items() if n.startswith("optimizer"))
    return moved + 2 * states


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


def busiest(sent: Matrix, wire: Wire) -> int:
    """Bytes that the busiest card (or cable, where each pair has its own) carries in one direction."""
    if wire.per == "pair":
        return max(max(row) for row in sent)
    return max(max(pair) for pair in card_bytes(sent))
