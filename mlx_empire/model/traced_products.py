"""A layer's products while its graph is traced: which the backward computes again, and the graph without those kept.

The arrays that come into and out of a layer's products are further outputs of the traced vjp, so that their places in
the graph are known. What makes a result that is kept is then replaced by what the engine has in its place: a node of
what came in and of a further source, which is the kept array and lies in its buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import NamedTuple

import mlx.core as mx

from mlx_empire.model.attention.blocks import forward_operations
from mlx_empire.model.attention.traced import AttentionCall, TracedBlocks
from mlx_empire.model.kept import ATTENTION, Watching, calling
from mlx_empire.model.liveness import Graph, evaluations
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


@dataclass
class TracedProducts:
    """The products of a layer's last run, of which those of `wanted` numbers are kept, None: all; in blocks attends
    `blocks`."""

    blocks: TracedBlocks
    wanted: Sequence[int] | None = ()
    _watching: Watching = field(default_factory=Watching)
    _attention: list[AttentionCall] = field(default_factory=list)
    _places: list[list[tuple[list[int], list[int]]]] = field(default_factory=list)  # among the extra outputs
    _extra: int = 0

    def watch(self) -> AbstractContextManager[None]:
        """A call of a layer within."""
        self._watching = Watching()
        return calling(self._watching.product)

    @property
    def _numbers(self) -> Sequence[int]:
        if self.wanted is not None:
            return self.wanted
        return [*([ATTENTION] if self._attention else []), *range(len(self._watching.products))]

    def extra(self) -> list[mx.array]:
        """Further outputs of the graph, each array once."""
        found: dict[int, mx.array] = {}
        self._places, self._attention = [], list(self.blocks.calls)
        for calls in map(self._made, self._numbers):
            found |= {id(a): a for made in calls for arrays in made for a in arrays}
            order = list(found)
            self._places.append(
                [
                    ([order.index(id(a)) for a in m.results], [order.index(id(a)) for a in m.given])
                    for m in calls
                ]
            )
        self._extra = len(found)
        return list(found.values())

    def kept_in(self, graph: Graph) -> Graph:
        """The graph with the wanted results as sources; the extra outputs, its last ones, are none any more."""
        if not self._extra:
            return graph
        count = len(graph.outputs) - self._extra
        extra = graph.outputs[count:]
        shapes, items, nodes = list(graph.shapes), list(graph.items), list(graph.nodes)
        maker = {a: n for n, node in enumerate(nodes) for a in node.outputs}
        kept: list[int] = []
        for results, given in chain.from_iterable(self._places):
            own = list(range(len(shapes), len(shapes) + len(results)))
            arrays = [extra[i] for i in results]
            shapes += [graph.shapes[a] for a in arrays]
            items += [graph.items[a] for a in arrays]
            inputs = (*own, *(extra[i] for i in given))
            nodes[maker[arrays[0]]] = Primitive("Depends", (), inputs, tuple(arrays))
            kept += own
        return replace(
            graph,
            shapes=shapes,
            items=items,
            nodes=nodes,
            outputs=graph.outputs[:count],
            given=[*graph.given, *kept],
            sources=[*graph.sources, *kept],
        )

    def told(self, graph: Graph) -> list[Product]:
        """The wanted ones; computed again are those whose results `graph`, which `kept_in` gave, reads."""
        tapes = evaluations(graph)
        read = {a for tape in tapes for n in tape for a in graph.nodes[n].inputs}
        sizes = [sum(len(results) for results, _ in calls) for calls in self._places]
        sources = iter(graph.given[len(graph.given) - sum(sizes) :])
        found = []
        for number, size in zip(self._numbers, sizes, strict=True):
            found.append(self._product(number, again=bool(read & {*islice(sources, size)})))
        return found

    def _made(self, number: int) -> list[_Made]:
        """By call: one of a linear module, or all of attention."""
        if number == ATTENTION:
            return [_Made(c.results, c.given) for c in self._attention]
        given, result = self._watching.products[number]
        return [_Made([result], [given])]

    def _product(self, number: int, *, again: bool) -> Product:
        nbytes = sum(a.nbytes for made in self._made(number) for a in made.results)
        if number != ATTENTION:
            given, result = self._watching.products[number]
            return Product(number, nbytes, 2 * result.size * given.shape[-1], again)
        operations = (forward_operations(c.attention, *c.given[:3]) for c in self._attention)
        return Product(number, nbytes, sum(operations), again)
