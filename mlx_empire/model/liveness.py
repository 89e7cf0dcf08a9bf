"""The peak of evaluating a graph, without evaluating it: MLX's order, its buffers, and how far it runs ahead.

The order is `graph`'s. Buffers are `storage`'s, and `primitives` says who gets which.

MLX hands work to another thread and goes on: a buffer is taken when a primitive is handed over, and given back when
its last reader has been done. It waits once more than ten bundles of ten tasks are not done. Here the other thread is
never faster than it has to be, as is so where products take longer than a list is walked: what is measured is
this peak or, with small arrays, less.

Who reads an array last follows from the order alone. So that is a `Script`, which is written once and played from each
place of a bundle.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

from mlx_empire.model.graph import Graph, evaluations, order, outputs_of
from mlx_empire.model.primitives import rule_of
from mlx_empire.model.storage import Buffers, Primitive, Rule, View

TASKS_IN_BUNDLE, BUNDLES = 10, 10  # DISPATCHES_PER_TASK, MAX_ACTIVE_TASKS


# ---- what follows from the order


class Evaluated(NamedTuple):
    """A primitive and its rule; `sole`: its inputs that nobody else holds; `ended`: arrays that nobody holds after it.

    `first` is its first output, `others` are its inputs and further outputs.
    """

    rule: Rule
    node: Primitive
    first: int
    others: tuple[int, ...]
    sole: tuple[int, ...]
    ended: tuple[int, ...]


class HandedOver(NamedTuple):
    """An evaluation of `outputs`. `dropped`: arrays that the caller lets go once it is handed over; `taken`: those that
    another thread lets go once it is done."""

    outputs: Sequence[int]
    dropped: Sequence[int] = ()
    taken: Sequence[int] = ()


class Evaluation(NamedTuple):
    """The steps of an evaluation, and the arrays that nobody holds after it."""

    handed: HandedOver
    steps: Sequence[Evaluated]
    ended: Sequence[int]


@dataclass(frozen=True)
class Script:
    """Evaluations of a graph that follow one another; `unread`: sources that nobody holds and none of them reads."""

    graph: Graph
    unread: Sequence[int]
    evaluations: Sequence[Evaluation]


def script(graph: Graph, before: Sequence[int] = ()) -> Script:
    """The `evaluations` of a graph. Outputs of all but the last are dropped after them."""
    parts = outputs_of(graph, before)
    handed = [HandedOver(part, part) for part in parts[:-1]] + [HandedOver(parts[-1])]
    return _script(graph, evaluations(graph, before), handed, graph.outputs)


def script_ahead(graph: Graph, handed: Sequence[HandedOver]) -> Script:
    """Evaluations that the caller does not wait for."""
    tapes: list[list[int]] = []
    for one in handed:
        tapes.append(order(graph, one.outputs, {n for tape in tapes for n in tape}))
    owned = {a for one in handed for a in (*one.outputs, *one.dropped, *one.taken)}
    return _script(graph, tapes, handed, owned)


def _script(
    graph: Graph, tapes: Sequence[Sequence[int]], handed: Sequence[HandedOver], owned: Collection[int]
) -> Script:
    """`owned`: the arrays that the caller holds until it lets them go."""
    nodes = [graph.nodes[n] for tape in tapes for n in tape]
    holders = Counter(chain(owned, graph.held))
    holders.update(chain.from_iterable(side for node in nodes for side in (node.inputs, node.outputs)))

    def let_go(arrays: Iterable[int]) -> list[int]:
        ended = []
        for array in arrays:
            holders[array] -= 1
            if holders[array] == 0:
                ended.append(array)
        return ended

    def step(node: Primitive) -> Evaluated:
        first, *further = node.outputs
        sole = tuple(a for a in node.inputs if holders[a] == 1)
        others, ended = (*node.inputs, *further), let_go((*node.inputs, *node.outputs))
        return Evaluated(rule_of(node), node, first, others, sole, tuple(ended))

    unread = [a for a in graph.sources if not holders[a]]
    found = []
    for tape, one in zip(tapes, handed, strict=True):
        steps = [step(graph.nodes[n]) for n in tape]
        found.append(Evaluation(one, steps, let_go((*one.dropped, *one.taken))))
    return Script(graph, unread, found)


# ---- what hangs on where it begins


class Tasks:
    """The other thread's bundles of tasks: each gives back buffers once done. `bundled`: tasks of the open bundle."""

    def __init__(self, memory: Buffers, bundled: int = 0) -> None:
        self._memory, self._bundled = memory, bundled
        self._closed: deque[list[int]] = deque()  # by bundle the buffers that go with it
        self._open: list[int] = []

    def hand_over(self, tasks: int, buffers: Collection[int]) -> None:
        """`tasks` of a primitive, and one that holds its `buffers` until then."""
        self._bundled += tasks + 1
        if self._bundled < TASKS_IN_BUNDLE:
            self._open += buffers
        else:
            closes, self._bundled = divmod(self._bundled, TASKS_IN_BUNDLE)
            ends = self._bundled == 0  # the last one closes a bundle itself
            for _ in range(closes - ends):
                self._close()
            self._open += buffers
            if ends:
                self._close()
        if len(self._closed) > BUNDLES:
            self._memory.drop(self._closed.popleft())

    def finish(self) -> None:
        """Wait for all."""
        for bundle in self._closed:
            self._memory.drop(bundle)
        self._memory.drop(self._open)
        self._closed.clear()
        self._open = []

    def _close(self) -> None:
        self._closed.append(self._open)
        self._open = []


@dataclass(frozen=True)
class Played:
    """An evaluation: bytes beside the sources at its worst moment.

    `alive`: what is alive then, by the array that was first in a buffer (-1: temporaries). `results`: by output so far
    the array that was first in its buffer.
    """

    peak: int
    alive: Mapping[int, int]
    results: Mapping[int, int]


def play(script: Script, *, bundled: int = 0, donates: bool = True, shares: bool = True) -> list[Played]:
    """Play a script evaluation by evaluation: one `Played` for each."""
    memory = _begun(script, Buffers(script.graph, donates=donates, shares=shares))
    stream = Tasks(memory, bundled)
    found: list[Played] = []
    results: dict[int, int] = {}
    for one in script.evaluations:
        memory.begin()
        _evaluate(memory, stream, one.steps)
        stream.finish()
        results = results | {a: memory.first_in(a) for a in one.handed.outputs}
        memory.forget(one.ended)
        found.append(Played(memory.peak, memory.alive_at_peak(), results))
    return found


def play_ahead(script: Script, *, bundled: int = 0, layouts: Mapping[int, View] | None = None) -> Played:
    """Play evaluations that follow one another at once.

    `layouts`: how sources lie that are not in the order of rows.
    """
    memory = _begun(script, Buffers(script.graph), layouts)
    stream = Tasks(memory, bundled)
    results: dict[int, int] = {}
    for one in script.evaluations:
        _evaluate(memory, stream, one.steps)
        results |= {a: memory.first_in(a) for a in one.handed.outputs}
        taken = {memory.views[a].buffer for a in one.handed.taken}
        for buffer in taken:
            memory.hold(buffer)
        memory.forget(one.ended)
        stream.hand_over(0, taken)
    return Played(memory.peak, memory.alive_at_peak(), results)


def layouts_of(graph: Graph, arrays: Sequence[int]) -> list[View]:
    """How `arrays`, outputs of the graph, lie in memory once they are evaluated."""
    written = script(replace(graph, held=frozenset(graph.sources)))
    memory = _begun(written, Buffers(graph))
    for one in written.evaluations:
        _evaluate(memory, Tasks(memory), one.steps)
    return [memory.views[a] for a in arrays]


def _begun(script: Script, memory: Buffers, layouts: Mapping[int, View] | None = None) -> Buffers:
    """The sources are there; those that nobody reads have gone."""
    for array in script.graph.sources:
        memory.fresh(array)
    for array, view in (layouts or {}).items():
        memory.views[array].strides, memory.views[array].flags = view.strides, view.flags
    memory.begin()
    memory.forget(script.unread)
    return memory


def _evaluate(memory: Buffers, stream: Tasks, steps: Iterable[Evaluated]) -> None:
    views, holders = memory.views, memory.holders
    for rule, node, first, others, sole, ended in steps:
        memory.sole = sole
        tasks, temporaries = rule(memory, node)
        buffers = {views[a].buffer for a in others}
        buffers.discard(views[first].buffer)
        for buffer in buffers:
            holders[buffer] += 1
        stream.hand_over(tasks, (*buffers, *temporaries) if temporaries else buffers)
        if ended:
            memory.forget(ended)
