"""The memory ledger: what a rank needs, by name, in bytes, and in which phase of a step it needs it.

`resident` is there for the whole step; each phase (forward, head, backward, embed, update) adds what is alive in it
alone. The peak is resident + the largest phase. Sizes of buffers are exact. What one layer's recomputation and
attention need is *fitted*: peak bytes of a layer's vjp over six families on MLX 0.32 CPU, within about 10 % above
512 positions; on Metal it is unmeasured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from mlx_empire.plan.model import ITEM_BYTES, ModelSpec, TensorSpec, UnitSpec
from mlx_empire.plan.shards import CHUNK_ELEMENTS, Segment, ShardPlan, Unit
from mlx_empire.plan.traffic import staging_bytes
from mlx_empire.plan.workload import Workload, chunk_tokens


class StateBytes(Protocol):
    """The optimizer's answer: bytes of its state by name."""

    def __call__(self, elements: int, weight_dtype: str, *, quantised: bool) -> Mapping[str, int]: ...


# Fitted: peak of one layer's vjp = ACTIVATION x (sum of its matrices' inputs and outputs) x tokens
#                                   + ATTENTION x heads x rows x width^2, both in the compute dtype.
ACTIVATION = 2.6
ATTENTION = 3.4
ATTENTION_WIDE = 5.2  # latent attention, attention sinks, soft-capped scores: more copies of the scores
# One un-recomputed layer keeps its forward's intermediates; a vjp holds about twice that.
KEPT_FRACTION = 0.55
LOGITS_COPIES = 3.0  # fp32 arrays of a chunk's logits alive in cross entropy's gradient
# Measured temporaries of one optimizer call, bytes per element: plain fp32, exact master, 8-bit states.
UPDATE_PLAIN, UPDATE_EXACT, UPDATE_CODES = 12, 20, 82
BASE = 2 << 20  # MLX buffers that are no tensor: rotary tables, scalars, masks


@dataclass(frozen=True)
class Ledger:
    """Bytes by name: for the whole step, and by phase."""

    resident: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]

    @property
    def largest_phase(self) -> str:
        """The phase that sets the peak."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """Bytes needed at the worst moment of a step."""
        return sum(self.resident.values()) + sum(self.phases[self.largest_phase].values())

    def items(self) -> dict[str, int]:
        """What makes up the peak, by name."""
        return {**self.resident, **self.phases[self.largest_phase]}


def ledger(spec: ModelSpec, plan: ShardPlan, work: Workload, rank: int, state_bytes: StateBytes) -> Ledger:
    """What `rank` needs for a training step of `work`; `state_bytes` comes from the optimizer."""
    root, layers = plan.units[0], plan.units[1:]
    micro_batches = work.micro_batches(rank)
    item, gradient_item = ITEM_BYTES[spec.dtype], ITEM_BYTES[work.gradient_dtype]
    hidden = hidden_bytes(spec, work)
    cut = len(layers) - work.tail
    sharded = plan.zero_stage == 3
    states = _states(plan, rank, state_bytes)
    resident = {
        "weights": _over_segments(plan, rank, lambda s, n: n * s.itemsize, weights=True),
        **states,
        "gradients": _over_segments(plan, rank, lambda s, n: n * gradient_item * (s.kind != "frozen")),
        "gathered root": root.gathered_bytes if sharded else 0,
        "layer inputs": micro_batches * (cut + 2) * hidden,
        "base": BASE,
    }
    largest = max(u.gathered_bytes for u in layers) if sharded else 0
    widest = max(trainable_bytes(u) for u in layers)
    root_gradient = trainable_bytes(root)
    sums = root_gradient * (2 if item == 2 else 1) * work.layout.rounds
    spec_layers = spec.units[1:]
    activations = max(activation_bytes(u, spec, work) for u in spec_layers)
    recompute = max(activations, max(trainable_bytes(u) for u in layers))
    attention = attention_bytes(spec, work)
    adds_up = work.layout.micro_batches > work.layout.cells  # a cell of one keeps its gradients as they are
    unit_sums = 4 // item if adds_up else 1
    staging = max((_staging(u, rank, work.bucket_bytes) for u in plan.units), default=0)
    kept = int(KEPT_FRACTION * work.tail * (activations + attention))
    tail_units = sum(u.gathered_bytes for u in layers[cut:]) if sharded else 0
    chunk = chunk_tokens(_vocabulary(spec))
    logits = int(LOGITS_COPIES * 4 * min(chunk, work.tokens) * _vocabulary(spec))
    phases = {
        "forward": {"gathered units": 2 * largest, "one layer's forward": (recompute + attention) // 2},
        "head": {
            "gathered units": tail_units + 2 * largest,
            "root gradients": sums + (root_gradient if adds_up or work.tokens > chunk else 0),
            "logits chunk": logits,
            "un-recomputed tail": kept,
            "tail totals before rounding": _late_rounding(plan, work, rank, cut),
            "tail gradients": sum(trainable_bytes(u) for u in layers[cut:]) * (unit_sums + adds_up),
        },
        "backward": {
            "gathered units": 2 * largest,
            "root gradients": sums,
            "unit gradient sums": widest * unit_sums,
            "contributions in flight": widest,
            "exchange buffers": staging,
            "one layer's recompute": recompute,
            "attention": attention,
        },
        "embed": {
            "root gradients": sums + 2 * root_gradient,
            "contributions in flight": widest,
            "exchange buffers": staging,
        },
        "update": {
            "optimizer chunk": _update_bytes(plan, rank, states),
            "gathered units": 0 if sharded else 2 * max(u.gathered_bytes for u in plan.units),
        },
    }
    if plan.zero_stage == 1:
        held = sum(trainable_bytes(u) for u in plan.units) * work.layout.rounds
        phases["embed"]["contributions kept whole"] = held
    return Ledger(resident, phases)


def hidden_bytes(spec: ModelSpec, work: Workload) -> int:
    """Bytes of one hidden state of one micro-batch."""
    width = int(spec.text_config.get("hidden_size") or spec.text_config.get("n_embd") or 0)
    return work.tokens * width * ITEM_BYTES[spec.dtype]


def trainable_bytes(unit: Unit) -> int:
    """Bytes of a unit's gradient in the wire's dtype."""
    return sum(s.size * s.itemsize for s in unit.segments if s.kind != "frozen")


def activation_bytes(unit: UnitSpec, spec: ModelSpec, work: Workload) -> int:
    """Fitted peak of one layer's vjp for one micro-batch, without attention scores and gradients."""
    widths = sum(activation_width(t, spec) for t in unit.tensors)
    return int(ACTIVATION * widths * work.tokens * ITEM_BYTES[spec.dtype])


def activation_width(tensor: TensorSpec, spec: ModelSpec) -> int:
    """Elements per token that a weight's product reads and writes; stacked experts count once per chosen expert."""
    if len(tensor.shape) == 2:
        return sum(tensor.shape)
    if len(tensor.shape) == 3:
        chosen = int(
            spec.text_config.get("num_experts_per_tok") or spec.text_config.get("num_experts_per_token") or 1
        )
        return chosen * sum(tensor.shape[1:])
    return 0


def attention_bytes(spec: ModelSpec, work: Workload) -> int:
    """Fitted bytes of attention scores in one layer's vjp: quadratic in the width (CPU, or any array mask)."""
    text = spec.text_config
    heads = int(text.get("num_attention_heads") or text.get("n_head") or 0)
    wide = any(k in text for k in ("kv_lora_rank", "attn_logit_softcapping")) or spec.family.startswith(
        "gpt_oss"
    )
    factor = ATTENTION_WIDE if wide else ATTENTION
    return int(factor * heads * work.micro_size * work.width**2 * ITEM_BYTES[spec.dtype])


def _vocabulary(spec: ModelSpec) -> int:
    return int(spec.text_config.get("vocab_size") or 0)


def _staging(unit: Unit, rank: int, bucket_bytes: int) -> int:
    return max((staging_bytes(s.edges, s.itemsize, rank, bucket_bytes) for s in unit.segments), default=0)


def _over_segments(
    plan: ShardPlan, rank: int, size: Callable[[Segment, int], int], *, weights: bool = False
) -> int:
    total = 0
    for unit in plan.units:
        for segment in unit.segments:
            interval = plan.weights_interval if weights else plan.state_interval
            a, b = interval(segment, rank)
            total += size(segment, b - a)
    return total


def _late_rounding(plan: ShardPlan, work: Workload, rank: int, cut: int) -> int:
    """Totals of the tail stay in fp32 until the last round: what that costs beyond bfloat16 ones."""
    if work.gradient_dtype == "float32" or work.layout.rounds == 1:
        return 0
    segments = [s for u in plan.units[1 + cut :] for s in u.segments if s.kind != "frozen"]
    intervals = [plan.state_interval(s, rank) for s in segments]
    return sum(2 * (b - a) for a, b in intervals)


def _update_bytes(plan: ShardPlan, rank: int, states: Mapping[str, int]) -> int:
    """Temporaries of one evaluation of the optimizer: up to two chunks, or the rank's largest interval."""
    intervals = [plan.state_interval(s, rank) for u in plan.units for s in u.segments]
    elements = min(2 * CHUNK_ELEMENTS, max(b - a for a, b in intervals))
    codes = any("codes" in name for name in states)
    exact = "optimizer remainder" in states
    return elements * (UPDATE_CODES if codes else UPDATE_EXACT if exact else UPDATE_PLAIN)


def _states(plan: ShardPlan, rank: int, state_bytes: StateBytes) -> dict[str, int]:
    named: dict[str, int] = {}
    for unit in plan.units:
        for segment in unit.segments:
            if segment.kind == "frozen":
                continue
            a, b = plan.state_interval(segment, rank)
            for name, size in state_bytes(
                b - a, segment.dtype, quantised=segment.kind == "trainable"
            ).items():
                named[f"optimizer {name}"] = named.get(f"optimizer {name}", 0) + size
    return named
