"""A graph of arrays, the order in which MLX evaluates it, and graphs that are made of graphs.

The order is that of MLX's `eval` (0.32): from the outputs back, breadth first until 20 primitives wait, then depth
first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

from mlx_empire.model.storage import Primitive, Shape

WIDTH = 20  # MLX_BFS_MAX_WIDTH


@dataclass(frozen=True)
class Graph:
    """Arrays by number, with their shapes and bytes of an element, and the primitives between them.

    `nodes` are in an order in which they can be computed; `outputs` in that in which they are evaluated. `sources`:
    arrays that are there before, `given` by the caller or constants; of these the caller keeps `held` until the end.
    """

    shapes: Sequence[Shape]
    items: Sequence[int]
    nodes: Sequence[Primitive]
    outputs: Sequence[int]
    given: Sequence[int]
    sources: Sequence[int]
    held: frozenset[int]

    @cached_property
    def elements(self) -> Sequence[int]:
        """Of each array."""
        return [math.prod(shape) for shape in self.shapes]


def order(graph: Graph, outputs: Sequence[int], done: Collection[int] = ()) -> list[int]:
    """The numbers of the nodes as MLX evaluates them for `outputs`; those that are `done` are left out."""
    maker = {a: n for n, node in enumerate(graph.nodes) if n not in done for a in node.outputs}
    degree: dict[int, int] = {}
    reached = list(dict.fromkeys(maker[a] for a in outputs if a in maker))
    for a in outputs:
        if a in maker:
            degree[maker[a]] = degree.get(maker[a], 0) + 1
    seen = set(reached)
    while reached:
        for array in graph.nodes[reached.pop()].inputs:
            if (n := maker.get(array)) is not None:
                degree[n] = degree.get(n, 0) + 1
                if n not in seen:
                    seen.add(n)
                    reached.append(n)
    tape: list[int] = []  # from the outputs to the sources
    stack: list[tuple[int, int]] = []
    at = -1  # the outputs come first, as MLX's synchronizer has them
    while at < len(tape) or stack:
        if at >= len(tape):
            n, start = stack.pop()
        else:
            n, start = (-1 if at < 0 else tape[at]), 0
            at += 1
        inputs = outputs if n < 0 else graph.nodes[n].inputs
        for j in range(start, len(inputs)):
            if (made := maker.get(inputs[j])) is None:
                continue
            if len(tape) - at >= WIDTH:
                stack.append((n, j))
                break
            degree[made] -= 1
            if degree[made] == 0:
                tape.append(made)
    return tape[::-1]


def evaluations(graph: Graph, before: Sequence[int] = ()) -> list[list[int]]:
    """The nodes in order of each evaluation: of so many outputs one after the other as `before` says, then the rest."""
    found: list[list[int]] = []
    for part in outputs_of(graph, before):
        found.append(order(graph, part, {n for tape in found for n in tape}))
    return found


def outputs_of(graph: Graph, before: Sequence[int]) -> list[Sequence[int]]:
    """The outputs by evaluation."""
    edges = [0, *accumulate(before), len(graph.outputs)]
    return [graph.outputs[a:b] for a, b in pairwise(edges)]


# ---- graphs of graphs


def repeated(graph: Graph, times: int, fed: Mapping[int, int], kept: Collection[int] = ()) -> Graph:
    """`graph` so many times in a row: for `fed` {a: b} the source `a` of one is the output `b` of the one before.

    Array a of the n-th is number n * len(graph.shapes) + a. Of the first `kept` are held, too.
    """
    size = len(graph.shapes)

    def number(n: int, a: int) -> int:
        return (n - 1) * size + fed[a] if n and a in fed else n * size + a

    def numbers(arrays: Iterable[int]) -> list[int]:
        return [number(n, a) for n in range(times) for a in arrays]

    nodes = [
        node._replace(
            inputs=tuple(number(n, a) for a in node.inputs), outputs=tuple(n * size + a for a in node.outputs)
        )
        for n in range(times)
        for node in graph.nodes
    ]
    sources = [n * size + a for n in range(times) for a in graph.sources if not (n and a in fed)]
    known = {*sources}
    held = frozenset([*kept, *(a for a in numbers(graph.held) if a in known)])
    outputs, given = numbers(graph.outputs), numbers(graph.given)
    return Graph(list(graph.shapes) * times, list(graph.items) * times, nodes, outputs, given, sources, held)


def continued(graph: Graph, more: Graph, fed: Sequence[int], place: int) -> tuple[Graph, list[int]]:
    """`graph` with the nodes of `more` behind its own, and what the outputs of `more` are in it.

    The first arrays that `more` is given are `fed` of `graph`; the others are given at `place`, as sources.
    """
    size = len(graph.shapes)
    number = dict(zip(more.given, fed, strict=False))

    def numbers(arrays: Iterable[int]) -> tuple[int, ...]:
        return tuple(number.get(a, size + a) for a in arrays)

    nodes = [node._replace(inputs=numbers(node.inputs), outputs=numbers(node.outputs)) for node in more.nodes]
    sources = numbers(a for a in more.sources if a not in number)
    joined = replace(
        graph,
        shapes=[*graph.shapes, *more.shapes],
        items=[*graph.items, *more.items],
        nodes=[*graph.nodes, *nodes],
        given=[*graph.given[:place], *numbers(more.given[len(fed) :]), *graph.given[place:]],
        sources=[*graph.sources, *sources],
        held=graph.held | {*numbers(a for a in more.held if a not in number)},
    )
    return joined, list(numbers(more.outputs))
