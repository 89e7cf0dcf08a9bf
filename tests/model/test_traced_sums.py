"""What is put behind a traced pass is what MLX traces where the pass does it itself."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_empire.model.graph import Graph, evaluations
from mlx_empire.model.layer_graph import graph_of
from mlx_empire.model.liveness import play, script
from mlx_empire.model.traced_sums import with_flat_copies, with_sums

SHAPES = ((8,), (4, 8), (3, 5))


def stand_ins(dtype: mx.Dtype) -> list[mx.array]:
    return [mx.zeros(shape, dtype) for shape in SHAPES]


def gradients(*arrays: mx.array) -> list[mx.array]:
    return [mx.exp(a) * a for a in arrays]


def told(graph: Graph) -> tuple[list[tuple[str, list[tuple[int, ...]], list[int]]], list[int]]:
    """Primitives in their order with the shapes and lengths of what they make, and the peaks of their evaluations."""
    (tape,) = evaluations(graph)
    made = [
        (graph.nodes[n].name, [graph.shapes[a] for a in out], [graph.items[a] for a in out])
        for n in tape
        for out in [graph.nodes[n].outputs]
    ]
    return made, [play(script(graph), bundled=start)[0].peak for start in range(10)]


@pytest.mark.parametrize("short", [mx.bfloat16, mx.float32])
@pytest.mark.parametrize("sum_dtype", [mx.bfloat16, mx.float32])
def test_appended_sums_are_those_of_a_pass_that_adds(short, sum_dtype):
    def adding(*arrays: mx.array) -> list[mx.array]:
        found = gradients(*arrays[:3])
        return [a.astype(mx.float32) + g.astype(mx.float32) for a, g in zip(arrays[3:], found, strict=True)]

    sums = stand_ins(sum_dtype)
    alone = graph_of(gradients, stand_ins(short), ())
    graph, results = with_sums(alone, alone.outputs, sums, len(alone.given))
    whole = graph_of(adding, [*stand_ins(short), *sums], ())
    graph = Graph(graph.shapes, graph.items, graph.nodes, results, graph.given, graph.sources, graph.held)
    assert told(graph) == told(whole)
    assert [graph.shapes[a] for a in graph.given] == [whole.shapes[a] for a in whole.given]


@pytest.mark.parametrize("short", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("wires", [(mx.float32,) * 3, (mx.float32, mx.bfloat16, mx.bfloat16)])
def test_appended_copies_are_those_of_a_pass_that_makes_gradients_flat(short, wires):
    """Of small tensors in short dtypes, which are exchanged in fp32, too."""

    def flattening(*arrays: mx.array) -> list[mx.array]:
        found = gradients(*arrays)
        flat = [g.astype(w).flatten() for g, w in zip(found, wires, strict=True)]
        return [
            *found,
            *(f for f, g, w in zip(flat, found, wires, strict=True) if (g.ndim, g.dtype) != (1, w)),
        ]

    if short == mx.float16:
        wires = tuple(mx.float16 if w == mx.bfloat16 else w for w in wires)
    alone = graph_of(gradients, stand_ins(short), ())
    graph, copies = with_flat_copies(alone, alone.outputs, wires)
    outputs = [*alone.outputs, *copies.values()]
    graph = Graph(graph.shapes, graph.items, graph.nodes, outputs, graph.given, graph.sources, graph.held)
    assert told(graph) == told(graph_of(flattening, stand_ins(short), ()))
