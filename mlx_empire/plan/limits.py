"""A node's other two limits beside its memory: how large its largest array is, and how many it holds at once.

Metal refuses a buffer above three quarters of the working set and more than 499,000 live buffers. Both counts
follow from the plan; neither can be measured on a CPU.
"""

from __future__ import annotations

from mlx_empire.model.spec import BLOCK, ModelSpec
from mlx_empire.plan.activations import attention_scores, widest_activation
from mlx_empire.plan.optimizer_bytes import StateBytes
from mlx_empire.plan.shards import Segment, ShardPlan
from mlx_empire.plan.workload import Workload, chunk_tokens

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
    count += work.micro_batches(rank) * (len(plan.units) - work.unrecomputed + 4)
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


def chunk_count(segment: Segment, start: int, stop: int) -> int:
    """The number of chunks of [start, stop)."""
    return sum(run.times for run in segment.runs(start, stop))
