"""What running and differentiating layers and head needs in bytes: graphs are traced once, played without an array.

A layer's costs depend on its tensors (`UnitSpec.kind`), on what the model gives it besides the hidden state, on its
switches (a layer without rotary positions) and on the micro-batch's shape. Layers that are alike in these are traced
once. A long tail of un-recomputed layers is traced up to `TRACED_TAIL` layers, and continued by what each layer before
adds in front of the others. Where MLX does not tell a graph there are no costs, and the plan takes what was fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from mlx_empire.model.attention.patterns import Pattern
from mlx_empire.model.attention.segments import Kernels
from mlx_empire.model.distillation import Distillation
from mlx_empire.model.graph import Graph, repeated
from mlx_empire.model.layer_graph import NotTraceable
from mlx_empire.model.layer_passes import Adds, LayerPasses, Pass
from mlx_empire.model.liveness import (
    BUNDLES,
    TASKS_IN_BUNDLE,
    HandedOver,
    Played,
    layouts_of,
    play,
    play_ahead,
    script,
    script_ahead,
)
from mlx_empire.model.spec import ModelSpec, UnitSpec
from mlx_empire.model.storage import View
from mlx_empire.model.traced_products import Product

T = TypeVar("T")
TRACED_TAIL = 4
TASKS_AHEAD = (BUNDLES + 1) * TASKS_IN_BUNDLE  # as many wait at most; a primitive is two or more
STARTS = range(0, TASKS_IN_BUNDLE, 3)  # an evaluation begins anywhere in a bundle of tasks: the worst counts


@dataclass(frozen=True)
class Need:
    """Bytes at a worst moment beside what was there before: all, and of them attention scores and gradients."""

    whole: int
    scores: int = 0
    gradients: int = 0

    def __add__(self, other: Need) -> Need:
        return Need(*(a + b for a, b in zip(self._parts, other._parts, strict=True)))

    def more_than(self, other: Need) -> Need:
        """The difference."""
        return Need(*(a - b for a, b in zip(self._parts, other._parts, strict=True)))

    @property
    def _parts(self) -> tuple[int, int, int]:
        return self.whole, self.scores, self.gradients


Needs = tuple[Need, ...]  # of evaluations that follow one another


class LayerCosts:
    """The needs of a model's layers and head on micro-batches of (rows, width), `chunk` tokens of the loss at a time.

    `linear`: kernels that make no scores compute causal attention without a mask, so those scores count nothing;
    `by_pattern`: layers attend by segments where they can; `how` a teacher's values count in the loss. Methods return
    None where the layers cannot be traced.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rows: int,
        width: int,
        chunk: int,
        *,
        linear: bool,
        by_pattern: bool = False,
        how: Distillation | None = None,
    ) -> None:
        self._spec, self._width, self._linear, self._patterned = spec, width, linear, by_pattern
        self._known: dict[tuple[object, ...], object] = {}
        try:
            kernels = Kernels(fused=linear) if by_pattern else None
            self._passes: LayerPasses | None = LayerPasses(spec, rows, width, chunk, kernels, how)
        except NotTraceable:
            self._passes = None
        # By identity of a unit its place; in `_numbers` alike layers have that of the first of them.
        self._places = {id(unit): n for n, unit in enumerate(spec.units)}
        self._numbers: dict[int, int] = {}
        firsts: dict[tuple[object, ...], int] = {}
        for n, unit in enumerate(spec.units[1:], 1):
            kind = unit.kind, self._passes.model.variant(n) if self._passes else None
            self._numbers[id(unit)] = firsts.setdefault(kind, n)

    @property
    def derived(self) -> bool:
        """Whether layers can be traced."""
        return self._passes is not None

    @property
    def argument_bytes(self) -> int:
        """Bytes of the masks that layers are given."""
        return self._passes.model.argument_bytes if self._passes else 0

    @property
    def masked(self) -> bool:
        """Whether there are layers that attend by a mask."""
        return self._passes is None or self._passes.model.masked

    def forward(self, unit: UnitSpec, *, ahead: bool = False) -> Need | None:
        """One layer's forward, its output included; `ahead`: handed over while those before it run."""
        n = self._numbers[id(unit)]
        if ahead:
            return self._once(("forward ahead", n), lambda p: self._forward_ahead(p, n))
        return self._once(("forward", n), lambda p: self._worst(p, (n,), p.forward(n))[-1])

    def products(self, unit: UnitSpec) -> list[Product]:
        """What one layer's run computes that could be kept, and whether its vjp computes it again; nothing where layers
        cannot be traced."""
        n = self._numbers[id(unit)]
        return self._once(("products", n), lambda p: p.products(n)) or []

    def backward(
        self, unit: UnitSpec, *, adds: Adds, ahead: bool = False, kept: tuple[int, ...] = ()
    ) -> Need | None:
        """One layer's vjp, which recomputes it but for what is `kept`; `ahead`: handed over while the one before runs,
        whose gradients are then made flat."""
        n = self._numbers[id(unit)]
        question = "backward", n, adds, ahead, kept
        if ahead:
            return self._once(question, lambda p: self._backward_ahead(p, n, adds, kept))
        return self._once(question, lambda p: self._worst(p, (n,), p.backward(n, adds=adds, kept=kept))[-1])

    def _forward_ahead(self, passes: LayerPasses, n: int) -> Need:
        one = passes.forward(n)
        (given,), (output,), size = one.graph.given[:1], one.graph.outputs, len(one.graph.shapes)
        times = 1 + -(-TASKS_AHEAD // len(one.graph.nodes))
        row = repeated(self._played(passes, (n,), one.graph), times, {given: output})
        handed = [HandedOver([k * size + output], [k * size + output]) for k in range(times - 1)]
        return self._worst_ahead(one, row, [*handed, HandedOver([(times - 1) * size + output])], {})

    def _backward_ahead(self, passes: LayerPasses, n: int, adds: Adds, kept: tuple[int, ...]) -> Need:
        """Of two layers in a row: at a reduction the main thread waits for the one before."""
        one = passes.backward(n, adds=adds, flat=True, kept=kept)
        graph, size = one.graph, len(one.graph.shapes)
        onward, (hidden, cotangent, *sums) = (
            graph.outputs[0],
            graph.given[: 2 + bool(adds) * len(one.gradients)],
        )
        layouts = {}
        if adds:  # sums lie as gradients do: those of matrices are transposed
            alone = passes.backward(n, adds="")
            views = layouts_of(alone.graph, alone.gradients)
            layouts = {k * size + a: v for k in (0, 1) for a, v in zip(sums, views, strict=True)}
        row = repeated(self._played(passes, (n,), graph), 2, {cotangent: onward}, kept=[hidden])
        handed: list[HandedOver] = []
        for start in (0, size):
            outputs = [start + a for a in (onward, *one.gradients)]
            copied = [start + a for a in one.flat]
            rest = [a for a in outputs[1:] if a not in copied]
            flat = [start + a for a in one.flat.values()]
            dropped = copied if start else [*copied, onward]
            handed += [HandedOver(outputs, dropped), HandedOver(flat, taken=[*flat, *rest])]
        return self._worst_ahead(one, row, handed, layouts)

    def _worst_ahead(
        self, one: Pass, row: Graph, handed: Sequence[HandedOver], layouts: Mapping[int, View]
    ) -> Need:
        written = script_ahead(row, handed)
        played = [play_ahead(written, bundled=start, layouts=layouts) for start in STARTS]
        return self._need(replace(one, graph=row), max(played, key=lambda found: found.peak))

    def head(self) -> Needs | None:
        """The loss with its gradients: the need of a first chunk, and of a later one where there is one."""
        return self._once(("head",), lambda p: self._worst(p, (), p.head()))

    def tail(self, units: Sequence[UnitSpec], *, adds: Adds) -> Needs | None:
        """The loss behind layers that are not recomputed, and their vjp: each chunk's needs, then the backward's."""
        last, behind = units[-TRACED_TAIL:], units[1 - TRACED_TAIL :]
        need = self._tail(last, adds)
        for unit in units[:-TRACED_TAIL]:
            more, fewer = self._tail([unit, *behind], adds), self._tail(behind, adds)
            if need is None or more is None or fewer is None:
                return None
            need = tuple(a + b.more_than(c) for a, b, c in zip(need, more, fewer, strict=True))
        return need

    def _tail(self, units: Sequence[UnitSpec], adds: Adds) -> Needs | None:
        """Of each layer itself, not of one that is alike: those that share tensors would share gradients."""

        def ask(passes: LayerPasses) -> Needs:
            numbers = [self._places[id(u)] for u in units]
            return self._worst(passes, numbers, passes.tail(numbers, adds=adds))

        return self._once(("tail", tuple(self._numbers[id(u)] for u in units), adds), ask)

    def _once(self, question: tuple[object, ...], ask: Callable[[LayerPasses], T]) -> T | None:
        if self._passes is None:
            return None
        if question not in self._known:
            try:
                self._known[question] = ask(self._passes)
            except NotTraceable:
                self._passes = None
                return None
        return self._known[question]  # type: ignore[return-value]

    def _played(self, passes: LayerPasses, units: Sequence[int], graph: Graph) -> Graph:
        if not self._linear:
            return graph
        return _without_scores(graph, {n for u in units for n in self._fused(passes.model.pattern(u))})

    def _worst(self, passes: LayerPasses, units: Sequence[int], traced: Pass) -> Needs:
        """The worst moment of each evaluation."""
        written = script(self._played(passes, units, traced.graph), traced.before)
        played = [play(written, bundled=start) for start in STARTS]
        return tuple(
            self._need(traced, max(evaluation, key=lambda one: one.peak))
            for evaluation in zip(*played, strict=True)
        )

    def _need(self, traced: Pass, one: Played) -> Need:
        graph = traced.graph
        scores = sum(n for a, n in one.alive.items() if a >= 0 and _is_score(graph.shapes[a], self._width))
        made = {one.results[a] for a in traced.gradients if a in one.results}
        return Need(one.peak, scores, sum(n for a, n in one.alive.items() if a in made))

    def _fused(self, pattern: Pattern | None) -> set[int]:
        """The lengths of the segments whose attention is fused on Metal."""
        if pattern is None:
            return set() if self._patterned else {self._width}
        return set() if pattern.window else {b - a for a, b in pattern.segments(0, self._width)}


def _is_score(shape: Sequence[int], width: int) -> bool:
    return len(shape) >= 4 and tuple(shape[-2:]) == (width, width)


def _without_scores(graph: Graph, lengths: Collection[int]) -> Graph:
    unmade = [any(_is_score(shape, n) for n in lengths) for shape in graph.shapes]
    items = [0 if none else n for none, n in zip(unmade, graph.items, strict=True)]
    return replace(graph, items=items)
