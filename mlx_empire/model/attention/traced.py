"""What stands for attention in blocks while a layer's graph is traced.

`mx.export_function` has no word for a function with a vjp of its own. So the forward's operations stand in the graph as
they are, cut off from the differentiation: the output gets a summand, whose cotangent is the output's, and the arrays
that came in are results of the layer as well, with cotangents that are placeholders. The backward's operations are
added after the vjp, and `put_together` puts their results in the place of the placeholders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import mlx.core as mx

from mlx_empire.model.attention.blocks import Attention
from mlx_empire.model.graph import Graph
from mlx_empire.model.storage import Primitive

Shapes = tuple[tuple[tuple[int, ...], mx.Dtype], ...]


@dataclass
class AttentionCall:
    """What came in and what came out of one call."""

    attention: Attention
    given: list[mx.array]
    results: list[mx.array]


@dataclass
class TracedBlocks:
    """The calls of `attend_in_blocks` in a pass; `shapes`: by call of what came in and of the output, once known;
    `folds`: see `Attention`."""

    shapes: list[Shapes] = field(default_factory=list)
    calls: list[AttentionCall] = field(default_factory=list)
    summands: list[mx.array] = field(default_factory=list)
    cotangents: list[mx.array] = field(default_factory=list)
    folds: bool = True

    def attend(self, attention: Attention, given: list[mx.array]) -> mx.array:
        """As `attend_in_blocks`; its derivative is what the summand's is."""
        attention = replace(attention, folds=self.folds)
        # MLX's node of the function keeps what came in until its results are there; so does this one.
        results: list[mx.array] = mx.depends(list(attention.forward(*given)), given)
        place = len(self.calls)
        self.calls.append(AttentionCall(attention, given, results))
        if place < len(self.summands):
            return mx.stop_gradient(results[0]) + self.summands[place]
        return results[0]

    @contextmanager
    def differentiated(self, shapes: Sequence[Shapes]) -> Iterator[None]:
        """Within, calls of these shapes are differentiated."""
        self.shapes = list(shapes)
        try:
            yield
        finally:
            self.shapes, self.calls, self.summands, self.cotangents = [], [], [], []

    def seen(self) -> list[Shapes]:
        """The shapes of the calls of the last pass."""
        return [tuple((tuple(a.shape), a.dtype) for a in (*c.given, c.results[0])) for c in self.calls]

    def placeholders(self) -> list[mx.array]:
        """Arrays without data: by call a summand, and then by call a cotangent for each array that came in."""
        summands = [mx.zeros(*shapes[-1]) for shapes in self.shapes]
        return summands + [mx.zeros(*one) for shapes in self.shapes for one in shapes[:-1]]

    def begin(self, placeholders: Sequence[mx.array]) -> None:
        """A call of layers: its attention gets these."""
        count = len(self.shapes)
        self.summands, self.calls = list(placeholders[:count]), []
        if len(placeholders) > count:
            self.cotangents = list(placeholders[count:])

    def came_in(self) -> list[mx.array]:
        """Further results of what is differentiated."""
        return [array for call in self.calls for array in call.given] if self.shapes else []

    def gradients(self, cotangents: Sequence[mx.array]) -> list[mx.array]:
        """By call the gradients by what came in, given the summands' cotangents."""
        found = []
        for call, cotangent in zip(self.calls, cotangents, strict=True):
            found += call.attention.backward(call.given, [cotangent], call.results)
        return found

    def put_together(self, graph: Graph) -> Graph:
        """The graph without placeholders, which are its last sources that were given; its last outputs, which are
        the gradients by what came in, are not outputs any more.
        """
        count = sum(len(shapes) - 1 for shapes in self.shapes)
        own = graph.given[len(graph.given) - len(self.shapes) - count :]
        gradients = graph.outputs[len(graph.outputs) - count :]
        same = dict(zip(own[len(self.shapes) :], gradients, strict=True))
        # Where the differentiated sum has array x placeholder, the array's cotangent is 1 x placeholder.
        for node in graph.nodes:
            for array in node.inputs if node.name == "Multiply" else ():
                if array in same:
                    same[node.outputs[0]] = same[array]
        given = graph.given[: len(graph.given) - len(own)]
        graph = replace(graph, given=given, outputs=graph.outputs[: len(graph.outputs) - count])
        return without_summands(graph, own[: len(self.shapes)], same)


def without_summands(
    graph: Graph, summands: Sequence[int], same: Mapping[int, int] = MappingProxyType({})
) -> Graph:
    """The graph without sources that are added once each; `same`: further sources, by what stands in their place."""
    own, found = set(summands), dict(same)
    nodes: list[Primitive] = []
    for node in graph.nodes:
        if node.name == "Add" and own & {*node.inputs}:
            (left,) = (a for a in node.inputs if a not in own)
            found[node.outputs[0]] = found.get(left, left)
        elif not (node.name == "Copy" and own & {*node.inputs}):
            nodes.append(node)
        else:
            own.add(node.outputs[0])

    def last(array: int) -> int:
        while array in found:
            array = found[array]
        return array

    nodes = [n._replace(inputs=tuple(map(last, n.inputs))) for n in nodes]
    gone = own | same.keys()
    return replace(
        graph,
        nodes=nodes,
        outputs=[last(a) for a in graph.outputs],
        sources=[a for a in graph.sources if a not in gone],
        held=graph.held - gone,
    )
