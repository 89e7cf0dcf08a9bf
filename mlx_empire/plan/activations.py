"""What one layer needs while it is run and differentiated: fitted, not counted.

With W the bytes of what a layer's products read and write for one micro-batch, A those of one array of attention
scores and G those of the layer's gradients, the peak of one layer's vjp is the larger of two moments:

    recompute x W + attention x A    (at the attention's backward)
    gradients x W + G                (at the end, when all gradients are there)

and that of its forward is forward x W + scores x A. The recompute's factor is another one over a frozen base, where
inputs that no weight's gradient needs go early. The factors were fitted by family to measured peaks (MLX 0.32, CPU,
float32, hidden 256 and 512, widths 64 to 1,024), mostly within 2 %; families that were not measured take `OTHERS`,
which is above most. On Metal, where causal attention without an array mask is linear, they are unmeasured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import NamedTuple, TypeVar

from mlx_empire.model.closed_forms import experts, is_stacked
from mlx_empire.model.spec import ITEM_BYTES, ModelSpec, TensorSpec, UnitSpec
from mlx_empire.plan.workload import Workload


class Fit(NamedTuple):
    """The factors of one family; `kept` and `kept_scores` are what an un-recomputed layer keeps for its backward.

    `adapted` is the recompute's factor over a frozen base; 0 where it was not measured.
    """

    recompute: float
    attention: float
    gradients: float
    forward: float
    scores: float
    kept: float
    kept_scores: float
    adapted: float = 0


FITS = {
    "llama": Fit(2.73, 3.17, 2.11, 1.07, 1.05, 1.44, 0.65, 2.78),
    "qwen2": Fit(2.75, 3.17, 2.0, 1.07, 1.05, 1.6, 1.05),
    "qwen3": Fit(2.94, 3.12, 2.01, 1.07, 1.05, 1.6, 1.05, 2.85),
    "qwen3_moe": Fit(2.57, 3.22, 1.5, 0.97, 1.03, 1.33, 1.03, 2.05),
    "mixtral": Fit(2.57, 3.17, 1.45, 0.97, 1.03, 1.33, 1.03, 2.0),
    "gemma": Fit(2.87, 3.12, 1.87, 1.05, 1.05, 1.6, 1.05),
    "gemma2": Fit(3.0, 4.3, 2.8, 1.21, 1.02, 1.8, 2.0, 2.1),
    "gemma3_text": Fit(3.55, 3.03, 2.03, 1.16, 1.06, 1.6, 1.05),
    "phi3": Fit(3.75, 3.13, 2.8, 1.42, 1.04, 1.61, 1.03, 4.1),
    "gpt2": Fit(4.25, 3.17, 3.08, 1.4, 1.05, 1.6, 1.05),
    "olmo2": Fit(3.12, 3.12, 1.92, 1.04, 1.06, 1.6, 1.05),
    "cohere2": Fit(2.71, 3.17, 2.24, 0.9, 1.09, 1.6, 1.05),
    "starcoder2": Fit(3.0, 3.17, 2.07, 1.0, 1.2, 1.6, 1.05),
    "llama4": Fit(2.13, 3.17, 1.25, 0.87, 1.03, 1.1, 1.05),
    "deepseek_v2": Fit(2.02, 3.17, 1.23, 0.82, 1.15, 1.1, 1.1),
    "deepseek_v3": Fit(2.15, 4.12, 1.27, 0.82, 2.0, 1.08, 1.12),
    "gpt_oss": Fit(2.21, 6.16, 1.3, 1.0, 3.05, 1.3, 2.0),
    "mamba2": Fit(10.0, 0.0, 8.5, 5.2, 0.0, 6.0, 0.0, 8.8),
}
OTHERS = Fit(3.2, 3.3, 2.3, 1.3, 1.1, 1.7, 1.1)
# Families whose layers get "causal" for a mask and no array, so that Metal's fused attention takes them.
PLAINLY_CAUSAL = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma", "phi3", "olmo2", "starcoder2")
SCAN = 3.6  # arrays of a chunk's decays, positions x positions x heads, alive in one layer's vjp
SCAN_CHUNK = 256  # positions that mlx-lm's state-space layers take at a time
ADAPTED_FORWARD = 1.1  # more in the forward with adapters
DORA, DORA_KEPT = 0.05, 0.5  # more of W in the recompute and kept, because DoRA scales what a matrix gives
NORM_COPIES = 2.0  # of an adapted matrix in fp32, while DoRA takes its rows' norms


def fit_of(spec: ModelSpec) -> Fit:
    """The factors of the model's family."""
    return FITS.get(spec.family, OTHERS)


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
        question = (function.__name__, unit.kind, work.micro_size, work.width, work.linear_attention)
        if question not in spec.known:
            spec.known[question] = function(unit, spec, work)
        found: Cost = spec.known[question]
        return found

    return answer


@once
def layer_costs(unit: UnitSpec, spec: ModelSpec, work: Workload) -> dict[str, int]:
    """What one layer's vjp for one micro-batch needs at its worst moment, its gradients included, by name."""
    fit, widths = fit_of(spec), width_bytes(unit, spec, work)
    scores, scan = _scores_in(unit, spec, work), scan_bytes(unit, spec, work)
    gradients, _ = gradient_bytes(unit, spec, work)
    norms = norm_bytes(unit)
    recompute = fit.adapted if fit.adapted and _is_adapted(unit) else fit.recompute
    during = {
        "one layer's recompute": int((recompute + (DORA if norms else 0)) * widths),
        "attention": int(fit.attention * scores),
        "state-space scan": scan,
        "DoRA norms": norms // 2,  # one of the two copies is gone by then
    }
    after = {"one layer's recompute": int(fit.gradients * widths), "one unit's gradients": gradients}
    return max(during, after, key=lambda items: sum(items.values()))


@once
def forward_bytes(unit: UnitSpec, spec: ModelSpec, work: Workload) -> int:
    """Peak of one layer's forward for one micro-batch."""
    fit = fit_of(spec)
    factor = fit.forward * (ADAPTED_FORWARD if _is_adapted(unit) else 1)
    scores = fit.scores * _scores_in(unit, spec, work)
    return int(factor * width_bytes(unit, spec, work) + scores) + scan_bytes(unit, spec, work) // 2


@once
def kept_bytes(unit: UnitSpec, spec: ModelSpec, work: Workload) -> int:
    """What an un-recomputed layer keeps of its forward for its backward, for one micro-batch."""
    fit = fit_of(spec)
    scores = fit.kept_scores * _scores_in(unit, spec, work)
    norms = norm_bytes(unit)
    kept = fit.kept + (DORA_KEPT if norms else 0)
    return int(kept * width_bytes(unit, spec, work) + scores) + scan_bytes(unit, spec, work) // 2 + norms


def tail_costs(
    units: Sequence[UnitSpec], spec: ModelSpec, work: Workload
) -> tuple[int, dict[str, int], dict[str, int]]:
    """Bytes that the un-recomputed tail keeps of its forward for one micro-batch, and what it needs, by name, at the
    start and at the end of its backward.

    MLX computes the cotangents of all its layers before the weights' gradients, so those appear late and together.
    """
    if not units:
        return 0, {}, {}
    kept = [kept_bytes(u, spec, work) for u in units]
    dearest = max((layer_costs(u, spec, work) for u in units), key=lambda items: sum(items.values()))
    start = {"un-recomputed tail": sum(kept) - min(kept), **dearest}
    gradients, stacked = zip(*(gradient_bytes(u, spec, work) for u in units), strict=True)
    rest = int(fit_of(spec).gradients * width_bytes(units[-1], spec, work))
    end = {
        "un-recomputed tail": rest,
        "tail gradients": sum(gradients) + max(stacked) * (len(units) > 1),
    }
    return sum(kept), start, end


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
    if work.linear_attention and spec.family in PLAINLY_CAUSAL and not text.get("sliding_window"):
        return 0
    heads = int(text.get("num_attention_heads") or text.get("n_head") or 0)
    return heads * work.micro_size * work.width**2 * ITEM_BYTES[spec.dtype]


def scan_bytes(unit: UnitSpec, spec: ModelSpec, work: Workload) -> int:
    """Bytes of a state-space layer's scan in its vjp: the decays within chunks, and the states between them.

    After the first chunk mlx-lm multiplies the state, broadcast over a chunk's positions, with every one of them.
    """
    if not any(t.name.endswith(("A_log", "A_logs")) for t in unit.tensors):
        return 0
    text = spec.text_config
    heads, head = _number(text, "num_heads", "mamba_num_heads"), _number(text, "head_dim", "mamba_head_dim")
    state = _number(text, "state_size", "ssm_state_size", "mamba_d_state")
    whole, rest = divmod(work.width, SCAN_CHUNK)
    decays = SCAN * heads * work.micro_size * (whole * SCAN_CHUNK**2 + rest**2)
    later = max(
        min(work.width - SCAN_CHUNK, work.width // 2), 0
    )  # positions after the first chunk, as measured
    states = work.micro_size * later * heads * head * state
    return int(4 * (decays + states))


def norm_bytes(unit: UnitSpec) -> int:
    """Bytes that DoRA needs to take the norms of the rows of a layer's largest adapted matrix; 0 without DoRA."""
    named = {f"{t.name.removesuffix('.m')}.linear.weight" for t in unit.tensors if t.name.endswith(".m")}
    return int(NORM_COPIES * 4 * max((t.size for t in unit.tensors if t.name in named), default=0))


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


def _number(text: object, *keys: str) -> int:
    assert hasattr(text, "get")
    return next((int(text.get(k)) for k in keys if text.get(k)), 0)
