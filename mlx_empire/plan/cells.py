"""Who computes which micro-batches: the *cells* that make a result independent of the number of ranks.

The M micro-batches of a step are divided into C cells of consecutive ones. In round i rank r computes cell i*N + r;
a rank without a cell still joins every collective and adds nothing. Owners add the cells' contributions in cell
order, so any N up to C gives the same sums, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_empire.errors import UserError


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
