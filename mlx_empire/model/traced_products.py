"""A layer's products while its graph is traced: which the backward computes again, and the graph without those kept.

The arrays that come into and out of a layer's products are further outputs of the traced vjp, so that their places in
the graph are known. What makes a result that is kept is then replaced by what the engine has in its place: a node of
what came in and of a further source, which is the kept array and lies in its buffer. So a layer is traced once, and
what is kept is chosen afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import NamedTuple

import mlx.core as mx

from mlx_empire.model.attention.blocks import forward_operations
from mlx_empire.model.attention.traced import TracedBlocks
from mlx_empire.model.graph import Graph, evaluations
from mlx_empire.model.kept import ATTENTION, Watching, calling
from mlx_empire.model.storage import Primitive


class Product(NamedTuple):
    """What a layer's run computes: its number (`kept`), for a micro-batch the bytes of its result and its operations,
    and whether the backward computes it `again`."""

    number: int
    nbytes: int
    operations: int
    again: bool


class _Made(NamedTuple):
    """The results of a call, and what came in."""

    results: list[mx.array]
    given: list[mx.array]


class TracedProduct(NamedTuple):
    """A product and, by call, its results and what came in, as arrays of the graph."""

    product: Product
    calls: list[tuple[list[int], list[int]]]


def kept_in(graph: Graph, products: Sequence[TracedProduct]) -> Graph:
    """The graph with the products' results as its last sources."""
    if not products:
        return graph
    shapes, items, nodes = list(graph.shapes), list(graph.items), list(graph.nodes)
    maker = {a: n for n, node in enumerate(nodes) for a in node.outputs}
    kept: list[int] = []
    for results, given in chain.from_iterable(one.calls for one in products):
        own = list(range(len(shapes), len(shapes) + len(results)))
        shapes += [graph.shapes[a] for a in results]
        items += [graph.items[a] for a in results]
        nodes[maker[results[0]]] = Primitive("Depends", (), (*own, *given), tuple(results))
        kept += own
    return replace(
        graph,
        shapes=shapes,
        items=items,
        nodes=nodes,
        given=[*graph.given, *kept],
        sources=[*graph.sources, *kept],
    )


def told(graph: Graph, products: Sequence[TracedProduct]) -> list[Product]:
    """What could be kept; computed again are those whose kept results the graph would read."""
    all_kept = kept_in(graph, products)
    read = {a for tape in evaluations(all_kept) for n in tape for a in all_kept.nodes[n].inputs}
    sources = iter(range(len(graph.shapes), len(all_kept.shapes)))
    sizes = [sum(len(results) for results, _ in one.calls) for one in products]
    again = [bool(read & {*islice(sources, size)}) for size in sizes]
    return [one.product._replace(again=is_read) for one, is_read in zip(products, again, strict=True)]


@dataclass
class TracedProducts:
    """The products of a layer's last run; in blocks attends `blocks`."""

    blocks: TracedBlocks
    _watching: Watching = field(default_factory=Watching)
    _found: list[tuple[Product, list[tuple[list[int], list[int]]]]] = field(default_factory=list)
    _extra: int = 0

    def watch(self) -> AbstractContextManager[None]:
        """A call of a layer within."""
        self._watching = Watching()
        return calling(self._watching.product)

    def extra(self) -> list[mx.array]:
        """Further outputs of the graph, its last ones, each array once."""
        places: dict[int, int] = {}
        arrays: list[mx.array] = []
        self._found = []
        for number, made in self._made():
            for array in chain.from_iterable((*one.results, *one.given) for one in made):
                if id(array) not in places:
                    places[id(array)] = len(arrays)
                    arrays.append(array)
            calls = [
                ([places[id(a)] for a in one.results], [places[id(a)] for a in one.given]) for one in made
            ]
            self._found.append((self._product(number, made), calls))
        self._extra = len(arrays)
        return arrays

    def taken_out(self, graph: Graph) -> tuple[Graph, list[TracedProduct]]:
        """The graph without the extra outputs, and the products in it."""
        count = len(graph.outputs) - self._extra
        extra = graph.outputs[count:]
        found = [
            TracedProduct(
                product,
                [([extra[i] for i in results], [extra[i] for i in given]) for results, given in calls],
            )
            for product, calls in self._found
        ]
        return replace(graph, outputs=graph.outputs[:count]), found

    def _made(self) -> list[tuple[int, list[_Made]]]:
        """By product its calls: one of a linear module, or all of attention."""
        attention = [_Made(c.results, c.given) for c in self.blocks.calls]
        products = [[_Made([result], [given])] for given, result in self._watching.products]
        return [*([(ATTENTION, attention)] if attention else []), *enumerate(products)]

    def _product(self, number: int, made: Sequence[_Made]) -> Product:
        nbytes = sum(a.nbytes for one in made for a in one.results)
        if number != ATTENTION:
            (one,) = made
            return Product(number, nbytes, 2 * one.results[0].size * one.given[0].shape[-1], False)
        operations = (forward_operations(c.attention, c.given[0], c.given[2]) for c in self.blocks.calls)
        return Product(number, nbytes, sum(operations), False)
