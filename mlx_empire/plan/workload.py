"""What one step asks of a rank, as numbers: the settings that memory and traffic are functions of."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_empire.plan.cells import CellLayout
from mlx_empire.plan.schedule import StepShape
from mlx_empire.plan.shards import ShardPlan
from mlx_empire.plan.traffic import Route

LOGITS_PER_CHUNK = 1 << 25  # tokens x vocabulary entries; 128 MiB in fp32
LOGITS_PER_FROZEN_CHUNK = 1 << 23
LEAST_CHUNK_TOKENS, MOST_CHUNK_TOKENS = 128, 4096


def chunk_tokens(vocabulary: int, *, frozen: bool = False) -> int:
    """Tokens per chunk of the loss: a power of two that keeps a chunk's logits near 2^25 elements.

    `frozen`: nothing of the root trains, so a chunk costs no sum of the head's gradient and can be a quarter as large:
    under adapters three arrays of logits would be the peak. Between 128 and 4,096; a function of model and recipe
    alone, because it affects bits.
    """
    most = LOGITS_PER_FROZEN_CHUNK if frozen else LOGITS_PER_CHUNK
    fitting = max(most // max(vocabulary, 1), 1)
    return min(max(1 << (fitting.bit_length() - 1), LEAST_CHUNK_TOKENS), MOST_CHUNK_TOKENS)


@dataclass(frozen=True)
class Workload:
    """A step's shape. `width` is the number of input positions of a row, `tail` the un-recomputed layers.

    `linear_attention`: causal attention without an array mask needs no scores (Metal). `optimizer_in_backward`: a unit
    is updated as soon as its gradient is complete, which is then not kept.
    """

    micro_size: int
    width: int
    layout: CellLayout
    unrecomputed: int
    gradient_dtype: str
    route: Route
    bucket_bytes: int
    optimizer_in_backward: bool = False
    linear_attention: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch, padding included."""
        return self.micro_size * self.width

    def micro_batches(self, rank: int) -> int:
        """Micro-batches that `rank` runs in a step."""
        return sum(len(cell) for cell in self.layout.of_rank(rank))


def step_shape(plan: ShardPlan, work: Workload, rank: int) -> StepShape:
    """What the order of `rank`'s step depends on."""
    cells = tuple(len(cell) for cell in work.layout.of_rank(rank))
    return StepShape(plan.zero_stage, plan.trained, cells, work.unrecomputed, work.optimizer_in_backward)
