"""What a pass does with its gradients once it has them, as further nodes of its traced graph.

A pass is traced alone. The micro-batches of a cell differ in what they add their gradients to, and running ahead in the
copies for the exchange; both are small graphs of their own, traced on stand-ins and put behind the pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_empire.model.graph import Graph, continued
from mlx_empire.model.layer_graph import graph_of


def with_sums(
    graph: Graph, gradients: Sequence[int], sums: Sequence[mx.array], place: int
) -> tuple[Graph, list[int]]:
    """The graph with `gradients` added to `sums` in fp32, and the results; the sums are given at `place`."""
    count = len(gradients)

    def body(*arrays: mx.array) -> list[mx.array]:
        pairs = zip(arrays[count:], arrays[:count], strict=True)
        return [a.astype(mx.float32) + g.astype(mx.float32) for a, g in pairs]

    stand_ins = [_stand_in(graph, a) for a in gradients]
    return continued(graph, graph_of(body, [*stand_ins, *sums], ()), gradients, place)


def with_flat_copies(
    graph: Graph, gradients: Sequence[int], wires: Sequence[mx.Dtype]
) -> tuple[Graph, dict[int, int]]:
    """The graph with `gradients` flat and in the dtypes in which they are exchanged; by gradient its copy, if it has to
    be one."""
    pairs = [(a, w) for a, w in zip(gradients, wires, strict=True) if _is_copied(graph, a, w)]
    stand_ins = [_stand_in(graph, a, w) for a, w in pairs]

    def body(*arrays: mx.array) -> list[mx.array]:
        return [a.astype(w).flatten() for a, (_, w) in zip(arrays, pairs, strict=True)]

    if not pairs:
        return graph, {}
    copied = [a for a, _ in pairs]
    graph, copies = continued(graph, graph_of(body, stand_ins, ()), copied, len(graph.given))
    return graph, dict(zip(copied, copies, strict=True))


def _is_copied(graph: Graph, gradient: int, wire: mx.Dtype) -> bool:
    """Whether a gradient is another array once it is flat and in the wire's dtype."""
    return len(graph.shapes[gradient]) != 1 or graph.items[gradient] != wire.size


def _stand_in(graph: Graph, array: int, wire: mx.Dtype = mx.bfloat16) -> mx.array:
    """An array without data: a gradient in float32, or in the short dtype of the wire."""
    return mx.zeros(graph.shapes[array], mx.float32 if graph.items[array] == 4 else wire)
