"""Which results of recomputed layers stay from the forward to the backward: what saves most operations a byte first.

What a result saves is what computing it again would take; what it costs is its own bytes, from its layer's forward to
its backward. Both are those of the layer's traced graph (`model.traced_products`); of a layer that cannot be traced
nothing is kept. Among equals the last layers come first: their results stay for the shortest time.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_empire.model.spec import ModelSpec, UnitSpec
from mlx_empire.model.traced_products import Product
from mlx_empire.plan.actions import StepShape
from mlx_empire.plan.activations import costs_of
from mlx_empire.plan.workload import Workload

# Putting a result in its place takes Python a tenth of a millisecond: what is computed sooner is computed again.
LEAST_OPERATIONS = 1 << 24
Order = tuple[tuple[int, tuple[int, ...]], ...]


def order_of(
    spec: ModelSpec, work: Workload, trained: tuple[bool, ...], least: int = LEAST_OPERATIONS
) -> Order:
    """(unit, products) of all layers that are recomputed, what saves most a byte first (`actions.Stash`); products of
    less than `least` operations are left out."""
    shape = StepShape(3, trained, (1,), work.unrecomputed, embeds=work.embeds)
    entries: list[tuple[int, int, tuple[int, ...]]] = []
    for u in range(shape.lowest, shape.boundary + 1):
        by_worth: dict[int, list[int]] = {}
        for product in costs_of(spec, work).products(spec.units[u]):
            if product.again and product.operations >= least:
                by_worth.setdefault(product.operations // product.nbytes, []).append(product.number)
        entries += [(worth, u, tuple(numbers)) for worth, numbers in by_worth.items()]
    return tuple((u, numbers) for _, u, numbers in sorted(entries, reverse=True))


def kept_bytes(unit: UnitSpec, products: Sequence[int], spec: ModelSpec, work: Workload) -> int:
    """Of the results of these products of a layer, for one micro-batch."""
    return sum(p.nbytes for p in _chosen(unit, products, spec, work))


def saved_operations(unit: UnitSpec, products: Sequence[int], spec: ModelSpec, work: Workload) -> int:
    """What need not be computed again of a layer for one micro-batch."""
    return sum(p.operations for p in _chosen(unit, products, spec, work))


def never_again(unit: UnitSpec, spec: ModelSpec, work: Workload) -> float:
    """Operations per token of a layer's forward that its backward never computes again: mostly those of the last
    product, whose result nothing reads. They do not hang on the width, so one is asked for."""
    question = "never again", unit.kind
    if question not in spec.known:
        spared = sum(p.operations for p in costs_of(spec, work).products(unit) if not p.again)
        spec.known[question] = spared / work.tokens
    found: float = spec.known[question]
    return found


def _chosen(unit: UnitSpec, products: Sequence[int], spec: ModelSpec, work: Workload) -> list[Product]:
    known = costs_of(spec, work).products(unit) if products else []
    return [p for p in known if p.number in products]
