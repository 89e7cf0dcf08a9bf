"""What one layer needs while it is run and differentiated, by the ledger's names.

Derived from the layer itself where mlx-lm's module can be traced (`model.layer_costs`): its graph, MLX's order of
evaluation and buffers, on a CPU. Where it cannot (layers that cannot be traced) factors stand in that were fitted
to measured peaks of others and lie above most: with W the bytes of what a layer's products read and write for one
micro-batch, A those of one array of attention scores and G those of the layer's gradients, the peak of one layer's vjp
is the larger of two moments:

    recompute x W + attention x A    (at the attention's backward)
    gradients x W + G                (at the end, when all gradients are there)

On Metal, where causal attention without an array mask is linear, both count no scores and are unmeasured. Nor does the
graph of a layer that attends by pattern have scores of pairs that are masked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import NamedTuple, TypeVar

from mlx_empire.model.attention.blocks import largest_scores
from mlx_empire.model.attention.fused import attention_is_fused
from mlx_empire.model.attention.segments import SHORT
from mlx_empire.model.closed_forms import experts, is_stacked
from mlx_empire.model.distillation import bytes_per_target
from mlx_empire.model.layer_costs import LayerCosts, Need
from mlx_empire.model.layer_passes import Adds
from mlx_empire.model.spec import ITEM_BYTES, ModelSpec, TensorSpec, UnitSpec
from mlx_empire.plan.root_memory import RootMemory
from mlx_empire.plan.workload import Workload, chunk_tokens


class Fit(NamedTuple):
    """Factors; `kept` and `kept_scores` are what an un-recomputed layer keeps for its backward."""

    recompute: float
    attention: float
    gradients: float
    forward: float
    scores: float
    kept: float
    kept_scores: float


FITTED = Fit(3.2, 3.3, 2.3, 1.3, 1.1, 1.7, 1.1)
# Families whose layers get "causal" for a mask and no array, so that Metal's fused attention takes them.
PLAINLY_CAUSAL = (
    *("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma", "phi3", "olmo", "olmo2", "starcoder2"),
    "falcon",  # without ALiBi
)
ADAPTED_FORWARD = 1.1  # more in the forward with adapters


def costs_of(spec: ModelSpec, work: Workload) -> LayerCosts:
    """The costs of the model's layers on such micro-batches, traced where they can be."""
    by_pattern = work.by_pattern and work.width > SHORT
    linear = work.linear_attention if by_pattern else needs_no_scores(spec, work)
    question = "layer costs", work.micro_size, work.width, linear, by_pattern, work.distillation
    if question not in spec.known:
        vocabulary = int(spec.text_config.get("vocab_size") or 0)
        chunk = chunk_tokens(vocabulary, frozen=spec.frozen_root)
        spec.known[question] = LayerCosts(
            spec,
            work.micro_size,
            work.width,
            chunk,
            linear=linear,
            by_pattern=by_pattern,
            how=work.distillation,
        )
    found: LayerCosts = spec.known[question]
    return found


def needs_no_scores(spec: ModelSpec, work: Workload) -> bool:
    """Whether attention is taken by a kernel that makes no scores."""
    sliding = spec.text_config.get("sliding_window")
    plain = spec.family in PLAINLY_CAUSAL and not sliding and not spec.text_config.get("alibi")
    return work.linear_attention and plain and attention_is_fused(spec.text_config)


def hidden_bytes(spec: ModelSpec, work: Workload) -> int:
    """Bytes of one hidden state of one micro-batch."""
    width = int(spec.text_config.get("hidden_size") or spec.text_config.get("n_embd") or 0)
    return work.tokens * width * ITEM_BYTES[spec.dtype]


Cost = TypeVar("Cost")


def once(
    function: Callable[[UnitSpec, ModelSpec, Workload], Cost],
) -> Callable[[UnitSpec, ModelSpec, Workload], Cost]:
    """Ask `function` once for each kind of layer and shape of micro-batch."""

    @wraps(function)
    def answer(unit: UnitSpec, spec: ModelSpec, work: Workload) -> Cost:
        way = work.linear_attention, work.by_pattern
        question = (function.__name__, unit.kind, work.micro_size, work.width, *way)
        if question not in spec.known:
            spec.known[question] = function(unit, spec, work)
        found: Cost = spec.known[question]
        return found

    return answer


def layer_costs(
    unit: UnitSpec, spec: ModelSpec, work: Workload, *, adds: Adds, kept: tuple[int, ...] = ()
) -> dict[str, int]:
    """What one layer's vjp for one micro-batch needs at its worst moment, its gradients included, by name.

    `kept`: products that are not computed again.
    """
    need = costs_of(spec, work).backward(unit, adds=adds, ahead=work.run_ahead, kept=kept)
    if need is None:
        fitted = _fitted_costs(unit, spec, work)
        ahead = gradient_bytes(unit, spec, work)[0] if work.run_ahead else 0
        return {**fitted, "one unit's gradients": fitted.get("one unit's gradients", 0) + ahead}
    return _named(need, "one layer's recompute", "one unit's gradients")


def forward_bytes(unit: UnitSpec, spec: ModelSpec, work: Workload) -> int:
    """Peak of one layer's forward for one micro-batch, its output included."""
    need = costs_of(spec, work).forward(unit, ahead=work.run_ahead)
    if need is not None:
        return need.whole
    factor = FITTED.forward * (ADAPTED_FORWARD if _is_adapted(unit) else 1)
    scores = FITTED.scores * _scores_in(unit, spec, work)
    return int(factor * width_bytes(unit, spec, work) + scores) + hidden_bytes(spec, work)


def head_costs(
    units: Sequence[UnitSpec], spec: ModelSpec, work: Workload, *, adds: Adds
) -> list[dict[str, int]]:
    """What the loss of one micro-batch needs behind an un-recomputed tail of `units`, gradients included, by name, at
    each moment that may be the worst.
    """
    root, hidden = RootMemory(spec, work), hidden_bytes(spec, work)
    chunked = {"layer inputs": hidden} if root.chunked else {}  # gradients of earlier chunks
    if work.distillation is not None:
        chunked["teacher's values"] = work.tokens * bytes_per_target(work.distillation.top)
    costs = costs_of(spec, work)
    needs = costs.tail(units, adds=adds) if units else costs.head()
    if needs is None:
        return _fitted_head(units, spec, work)
    names = "un-recomputed tail" if units else "logits chunk", "root gradients"
    chunks = needs[:-1] if units else needs
    moments = [chunked | _named(need, *names) for need in chunks]
    if units:
        backward = _named(needs[-1], "un-recomputed tail", "tail gradients")
        moments.append(({} if adds else {"root gradients": root.head_sum(1)}) | backward)
    return moments


def _named(need: Need, rest: str, gradients: str) -> dict[str, int]:
    """A need by the ledger's names; what went of the layer's own inputs lessens the rest."""
    known = need.scores + need.gradients
    named = {rest: need.whole - known, "attention": need.scores, gradients: need.gradients}
    return {name: size for name, size in named.items() if size}


@once
def _fitted_costs(unit: UnitSpec, spec: ModelSpec, work: Workload) -> dict[str, int]:
    widths, scores = width_bytes(unit, spec, work), _scores_in(unit, spec, work)
    during = {
        "one layer's recompute": int(FITTED.recompute * widths),
        "attention": int(FITTED.attention * scores),
    }
    after = {
        "one layer's recompute": int(FITTED.gradients * widths),
        "one unit's gradients": gradient_bytes(unit, spec, work)[0],
    }
    return max(during, after, key=lambda items: sum(items.values()))


def _fitted_head(units: Sequence[UnitSpec], spec: ModelSpec, work: Workload) -> list[dict[str, int]]:
    root = RootMemory(spec, work)
    one = root.head * (root.wide if root.chunked else 1) + root.head * root.chunked
    always = {"layer inputs": 2 * hidden_bytes(spec, work), "root gradients": one}
    if work.distillation is not None:
        always["teacher's values"] = work.tokens * bytes_per_target(work.distillation.top)
    if not units:
        return [always | {"logits chunk": root.fitted_logits}]
    kept, moments = _fitted_tail(units, spec, work)
    logits = {"un-recomputed tail": kept, "logits chunk": root.fitted_logits}
    return [always | moment for moment in (logits, *moments)]


def _fitted_tail(
    units: Sequence[UnitSpec], spec: ModelSpec, work: Workload
) -> tuple[int, list[dict[str, int]]]:
    """MLX computes the cotangents of all its layers before the weights' gradients, so those come late and together."""
    kept = [
        int(FITTED.kept * width_bytes(u, spec, work) + FITTED.kept_scores * _scores_in(u, spec, work))
        for u in units
    ]
    dearest = max((_fitted_costs(u, spec, work) for u in units), key=lambda items: sum(items.values()))
    gradients, stacked = zip(*(gradient_bytes(u, spec, work) for u in units), strict=True)
    rest = int(FITTED.gradients * width_bytes(units[-1], spec, work))
    end = {"un-recomputed tail": rest, "tail gradients": sum(gradients) + max(stacked) * (len(units) > 1)}
    return sum(kept), [{"un-recomputed tail": sum(kept) - min(kept), **dearest}, end]


@once
def gradient_bytes(unit: UnitSpec, spec: ModelSpec, work: Workload) -> tuple[int, int]:
    """Bytes of one micro-batch's gradients of a layer, and of those the part of stacked experts."""
    total, _ = experts(spec.text_config)
    sizes = [(t.size * ITEM_BYTES[t.dtype], is_stacked(t, total)) for t in unit.tensors if t.trainable]
    return sum(size for size, _ in sizes), sum(size for size, stacked in sizes if stacked)


@once
def width_bytes(unit: UnitSpec, spec: ModelSpec, work: Workload) -> int:
    """Bytes of what a layer's products read and write for one micro-batch."""
    return sum(activation_width(t, spec) for t in unit.tensors) * work.tokens * ITEM_BYTES[spec.dtype]


def activation_width(tensor: TensorSpec, spec: ModelSpec) -> int:
    """Elements per token that a weight's product reads and writes; stacked experts count once per chosen expert."""
    shape = tensor.shape
    if tensor.group:
        return 0  # scales and biases
    if tensor.bits:
        shape = (*shape[:-1], shape[-1] * 32 // tensor.bits)
    if ".lora_" in tensor.name:  # what lies between the two; its input and output are the matrix's
        return min(shape[-2:]) if tensor.name.endswith("a") else 0
    total, chosen = experts(spec.text_config)
    if len(shape) == 3 and total > 0 and shape[0] == total:
        return chosen * sum(shape[1:])
    return sum(shape) if len(shape) == 2 else 0


def attention_scores(spec: ModelSpec, work: Workload) -> int:
    """Bytes of one array of a layer's attention scores for one micro-batch; 0 where none is made."""
    text = spec.text_config
    if needs_no_scores(spec, work):
        return 0
    heads = int(text.get("num_attention_heads") or text.get("n_head") or 0)
    if work.by_pattern and work.width > SHORT and not costs_of(spec, work).masked:
        return heads * work.micro_size * largest_scores(work.width) * ITEM_BYTES["float32"]
    return heads * work.micro_size * work.width**2 * ITEM_BYTES[spec.dtype]


@once
def widest_activation(unit: UnitSpec, spec: ModelSpec, work: Workload) -> int:
    """Bytes of the largest activation of a layer for one micro-batch."""
    total, chosen = experts(spec.text_config)
    widths = [
        max(t.shape[-2:]) * (chosen if is_stacked(t, total) else 1)
        for t in unit.tensors
        if len(t.shape) in (2, 3)
    ]
    return max(widths, default=0) * work.tokens * ITEM_BYTES[spec.dtype]


def _is_adapted(unit: UnitSpec) -> bool:
    return any(".lora_" in t.name for t in unit.tensors)


def _scores_in(unit: UnitSpec, spec: ModelSpec, work: Workload) -> int:
    attends = any("attn" in t.name or "attention" in t.name for t in unit.tensors)
    return attention_scores(spec, work) if attends else 0
