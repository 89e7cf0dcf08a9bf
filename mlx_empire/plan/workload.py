"""What one step asks of a rank, as numbers: the settings that memory and traffic are functions of.

And who computes which micro-batches: the *cells* that make a result independent of the number of ranks.

The M micro-batches of a step are divided into C cells of consecutive ones. In round i rank r computes cell i*N + r;
a rank without a cell still joins every collective and adds nothing. Owners add the cells' contributions in cell
order, so any N up to C gives the same sums, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_empire.errors import UserError
from mlx_empire.model.distillation import Distillation
from mlx_empire.plan.actions import NOTHING, Stash, StepShape
from mlx_empire.plan.shards import ShardPlan
from mlx_empire.plan.traffic import Route


@dataclass(frozen=True)
class CellLayout:
    """M micro-batches in C cells on N ranks."""

    micro_batches: int
    cells: int
    world_size: int

    @property
    def rounds(self) -> int:
        """Number of reduce-scatters each unit takes a step."""
        return -(-self.cells // self.world_size)

    def members(self, cell: int) -> range:
        """The micro-batches of a cell; cells differ in size by one at most."""
        return range(cell * self.micro_batches // self.cells, (cell + 1) * self.micro_batches // self.cells)

    def contributes(self, round_index: int) -> list[bool]:
        """For each rank, whether it has a cell in this round."""
        return [round_index * self.world_size + r < self.cells for r in range(self.world_size)]

    def of_rank(self, rank: int) -> list[range]:
        """The micro-batches of `rank`, round by round; an empty range where it has no cell."""
        cells = [i * self.world_size + rank for i in range(self.rounds)]
        return [self.members(c) if c < self.cells else range(0) for c in cells]


def cell_layout(global_size: int, micro_size: int, cells: int | str, world_size: int) -> CellLayout:
    """Resolve `batch.cells`: `auto` is one cell per rank, or per micro-batch where there are fewer of those."""
    micro_batches = global_size // micro_size
    count = min(world_size, micro_batches) if cells == "auto" else int(cells)
    if not 1 <= count <= micro_batches:
        raise UserError(
            f"batch.cells: {count}: must lie between 1 and global_size / micro_size = {micro_batches}"
        )
    return CellLayout(micro_batches, count, world_size)


LOGITS_PER_CHUNK = 1 << 25  # positions x vocabulary entries; 128 MiB in fp32
LOGITS_PER_FROZEN_CHUNK = 1 << 23
LEAST_CHUNK_TOKENS, MOST_CHUNK_TOKENS = 128, 4096


def chunk_tokens(vocabulary: int, *, frozen: bool = False) -> int:
    """Positions per chunk of the loss: a power of two that keeps a chunk's logits near 2^25 elements.

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
    is updated as soon as its gradient is complete, which is then not kept. `by_pattern`: long rows are attended by
    segments where layers allow it. `run_ahead`: the next layer is handed to the device while one runs. `compiled`:
    recomputed layers run by one trace for all of a kind. `stashes`: by rank, which results of recomputed layers stay;
    none where it is empty. `wave`: how many micro-batches of a cell at most pass all layers before the others do; 0:
    all of a step pass together. `paged`: buffers take whole pages (Metal; a CPU's are as long as what is in them).
    `strict`: the forward runs as where it is differentiated, and one choice of kept products holds for every
    micro-batch. `embeds`: whether something of what the embedding uses trains. `distillation`: how a teacher's values
    count in the loss, where there is one. `offload`: inputs of recomputed layers go to a file.
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
    by_pattern: bool = False
    run_ahead: bool = False
    compiled: bool = False
    stashes: tuple[Stash, ...] = ()
    wave: int = 0
    paged: bool = True
    strict: bool = True
    embeds: bool = True
    distillation: Distillation | None = None
    offload: bool = False

    def stash(self, rank: int) -> Stash:
        """Which results of recomputed layers stay on `rank`."""
        return self.stashes[rank] if self.stashes else NOTHING

    @property
    def tokens(self) -> int:
        """Input positions of one micro-batch, padding included."""
        return self.micro_size * self.width

    def micro_batches(self, rank: int) -> int:
        """Micro-batches that `rank` runs in a step."""
        return sum(len(cell) for cell in self.layout.of_rank(rank))


def step_shape(plan: ShardPlan, work: Workload, rank: int) -> StepShape:
    """What the order of `rank`'s step depends on."""
    cells = tuple(len(cell) for cell in work.layout.of_rank(rank))
    return StepShape(
        plan.zero_stage,
        plan.trained,
        cells,
        work.unrecomputed,
        work.optimizer_in_backward,
        work.run_ahead,
        work.stash(rank),
        work.wave,
        work.embeds,
        work.offload,
    )
