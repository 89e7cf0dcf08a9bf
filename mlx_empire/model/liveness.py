"""The peak of evaluating a graph, without evaluating it: MLX's order, its buffers, and how far it runs ahead.

The order is that of MLX's `eval` (0.32): from the outputs back, breadth first until 20 primitives wait, then depth
first. Buffers are `storage`'s, and `primitives` says who gets which.

MLX hands work to another thread and goes on: a buffer is taken when a primitive is handed over, and given back when
its last reader has been done. It waits once more than ten bundles of ten tasks are not done. Here the other thread is
never faster than it has to be, as is so where products take longer than a list is walked: what is measured is
this peak or, with small arrays, less.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

from mlx_empire.model.primitives import place_outputs
from mlx_empire.model.storage import Buffers, Primitive, Shape, View

WIDTH = 20  # MLX_BFS_MAX_WIDTH
TASKS_IN_BUNDLE, BUNDLES = 10, 10  # DISPATCHES_PER_TASK, MAX_ACTIVE_TASKS


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


class Tasks:
    """The other thread's bundles of tasks: each gives back buffers once done. `bundled`: tasks of the open bundle."""

    def __init__(self, memory: Buffers, bundled: int = 0) -> None:
        self._memory, self._bundled = memory, bundled
        self._closed: deque[list[int]] = deque()  # by bundle the buffers that go with it
        self._open: list[int] = []

    def hand_over(self, tasks: int, buffers: Collection[int]) -> None:
        """`tasks` of a primitive, and one that holds its `buffers` until then."""
        closes, self._bundled = divmod(self._bundled + tasks + 1, TASKS_IN_BUNDLE)
        ends = closes > 0 and self._bundled == 0  # the last one closes a bundle itself
        for _ in range(closes - ends):
            self._close()
        self._open += buffers
        if ends:
            self._close()
        if len(self._closed) > BUNDLES:
            self._give_back(self._closed.popleft())

    def finish(self) -> None:
        """Wait for all."""
        for bundle in self._closed:
            self._give_back(bundle)
        self._give_back(self._open)
        self._closed.clear()
        self._open = []

    def _close(self) -> None:
        self._closed.append(self._open)
        self._open = []

    def _give_back(self, buffers: Iterable[int]) -> None:
        for buffer in buffers:
            self._memory.drop(buffer)


@dataclass(frozen=True)
class Played:
    """An evaluation: bytes beside the sources at its worst moment.

    `alive`: what is alive then, by the array that was first in a buffer (-1: temporaries). `results`: by output so far
    the array that was first in its buffer.
    """

    peak: int
    alive: Mapping[int, int]
    results: Mapping[int, int]


def evaluations(graph: Graph, before: Sequence[int] = ()) -> list[list[int]]:
    """The nodes in order of each evaluation: of so many outputs one after the other as `before` says, then the rest."""
    found: list[list[int]] = []
    for part in _parts(graph, before):
        found.append(order(graph, part, {n for tape in found for n in tape}))
    return found


def play(
    graph: Graph,
    tapes: Sequence[Sequence[int]],
    before: Sequence[int] = (),
    *,
    bundled: int = 0,
    donates: bool = True,
    shares: bool = True,
) -> list[Played]:
    """Play the `evaluations` of a graph: one `Played` for each. Outputs of all but the last are dropped after them."""
    memory = Buffers(graph.shapes, graph.items, donates=donates, shares=shares)
    for array in graph.sources:
        memory.fresh(array)
    memory.begin()
    memory.refer((*graph.outputs, *graph.held, *graph.sources))
    memory.refer(_used(graph, tapes))
    for array in graph.sources:  # whoever is not held is left to the graph
        memory.release(array)
    stream = Tasks(memory, bundled)
    found: list[Played] = []
    results: dict[int, int] = {}
    for tape, part in zip(tapes, _parts(graph, before), strict=True):
        memory.begin()
        for n in tape:
            _evaluate(memory, stream, graph.nodes[n])
        stream.finish()
        results = results | {a: memory.firsts[memory.views[a].buffer] for a in part}
        if len(found) < len(tapes) - 1:
            for array in part:
                memory.release(array)
        found.append(Played(memory.peak, memory.alive_at_peak(), results))
    return found


# ---- evaluations that are handed over and not waited for


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


class HandedOver(NamedTuple):
    """An evaluation of `outputs`. `dropped`: arrays that the caller lets go once it is handed over; `taken`: those that
    another thread lets go once it is done."""

    outputs: Sequence[int]
    dropped: Sequence[int] = ()
    taken: Sequence[int] = ()


def play_ahead(
    graph: Graph, handed: Sequence[HandedOver], *, bundled: int = 0, layouts: Mapping[int, View] | None = None
) -> Played:
    """Play evaluations that follow one another at once.

    `layouts`: how sources lie that are not in the order of rows.
    """
    memory = Buffers(graph.shapes, graph.items)
    for array in graph.sources:
        memory.fresh(array)
    for array, view in (layouts or {}).items():
        memory.views[array].strides, memory.views[array].flags = view.strides, view.flags
    memory.begin()
    tapes: list[list[int]] = []
    for one in handed:
        tapes.append(order(graph, one.outputs, {n for tape in tapes for n in tape}))
    owned = {a for one in handed for a in (*one.outputs, *one.dropped, *one.taken)}  # by the caller
    memory.refer((*graph.held, *graph.sources, *owned))
    memory.refer(_used(graph, tapes))
    for array in graph.sources:
        memory.release(array)
    stream = Tasks(memory, bundled)
    results: dict[int, int] = {}
    for tape, one in zip(tapes, handed, strict=True):
        for n in tape:
            _evaluate(memory, stream, graph.nodes[n])
        results |= {a: memory.firsts[memory.views[a].buffer] for a in one.outputs}
        taken = {memory.views[a].buffer for a in one.taken}
        for buffer in taken:
            memory.hold(buffer)
        for array in (*one.dropped, *one.taken):
            memory.release(array)
        stream.hand_over(0, taken)
    return Played(memory.peak, memory.alive_at_peak(), results)


def layouts_of(graph: Graph, arrays: Sequence[int]) -> list[View]:
    """How `arrays`, outputs of the graph, lie in memory once they are evaluated."""
    memory = Buffers(graph.shapes, graph.items)
    for array in graph.sources:
        memory.fresh(array)
    stream = Tasks(memory)
    tape = order(graph, graph.outputs)
    memory.refer((*graph.outputs, *graph.sources))
    memory.refer(_used(graph, [tape]))
    for n in tape:
        _evaluate(memory, stream, graph.nodes[n])
    return [memory.views[a] for a in arrays]


def _parts(graph: Graph, before: Sequence[int]) -> list[Sequence[int]]:
    edges = [0, *accumulate(before), len(graph.outputs)]
    return [graph.outputs[a:b] for a, b in pairwise(edges)]


def _used(graph: Graph, tapes: Sequence[Sequence[int]]) -> Iterator[int]:
    """The arrays that the nodes of the tapes read and make, each as often as it is."""
    nodes = (graph.nodes[n] for tape in tapes for n in tape)
    return chain.from_iterable(side for node in nodes for side in (node.inputs, node.outputs))


def _evaluate(memory: Buffers, stream: Tasks, node: Primitive) -> None:
    done = place_outputs(memory, node)
    views = memory.views
    buffers = {views[a].buffer for a in (*node.inputs, *node.outputs[1:])}
    buffers.discard(views[node.outputs[0]].buffer)
    for buffer in buffers:
        memory.hold(buffer)
    stream.hand_over(done.tasks, (*buffers, *done.temporaries))
    for array in (*node.inputs, *node.outputs):
        memory.release(array)
