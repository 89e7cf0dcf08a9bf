"""What a rank keeps of recomputed layers from the forward to the backward, as numbers.

A list has the layers with products of theirs, what saves most first; each of its entries stands for a visit by every
micro-batch of the rank, in order. A rank keeps the results of the first so many visits. So at most one entry is kept
for some micro-batches and not for others, and one number says how far the memory goes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stash:
    """Which results of recomputed layers stay: the first `visits` of a list of visits to layers by micro-batches.

    `order`: (unit, products), what saves most a byte first; each stands for all micro-batches of a rank, in order.
    """

    order: tuple[tuple[int, tuple[int, ...]], ...] = ()
    visits: int = 0

    def products(self, unit: int, micro: int, micro_batches: int) -> tuple[int, ...]:
        """What stays of a layer for a micro-batch, in the order of the layer's calls."""
        if not self.visits:
            return ()
        entries = enumerate(self.order[: -(-self.visits // micro_batches)])
        found = (own for n, (u, own) in entries if u == unit and n * micro_batches + micro < self.visits)
        return tuple(sorted(product for own in found for product in own))

    def arrays(self, micro_batches: int) -> int:
        """How many results stay at most at a time, of so many micro-batches."""
        entries = enumerate(self.order)
        return sum(
            len(own) * min(max(self.visits - n * micro_batches, 0), micro_batches) for n, (_, own) in entries
        )


NOTHING = Stash()
