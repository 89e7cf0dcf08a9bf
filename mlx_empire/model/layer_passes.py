"""The passes of layers and head, traced as the engine runs them: a layer's forward and vjp, and the loss with the vjp
of an un-recomputed tail.

Layers are called on arrays without data in the dtypes that the specification names, with the arguments that the model
gives them (`layers.SlottedModel`), and attend by the patterns by which they do in training. The module may be in use:
its arrays, its list of layers and MLX's random state are put back.

What `mx.export_function` has no word for is stood for: `traced_experts` and `attention.traced`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_empire.model.attention.by_pattern import ByPattern
from mlx_empire.model.attention.patterns import Pattern, telling_width
from mlx_empire.model.attention.segments import Kernels
from mlx_empire.model.attention.traced import Shapes, TracedBlocks
from mlx_empire.model.build import find_layers, reason_of
from mlx_empire.model.closed_forms import root_parts
from mlx_empire.model.head_loss import head_chunks, joined_chunks
from mlx_empire.model.layer_graph import NotTraceable, graph_of
from mlx_empire.model.layers import Slot, SlottedModel, given_mask, hidden_of
from mlx_empire.model.liveness import Graph
from mlx_empire.model.spec import ModelSpec, TensorSpec
from mlx_empire.model.traced_experts import TracedExperts, stacked_tensors
from mlx_empire.model.traced_products import Product, TracedProducts

Arrays = Sequence[mx.array]
Body = Callable[..., list[mx.array]]
# What a pass adds its gradients to: nothing, those of one micro-batch in their own dtypes, or sums in fp32.
Adds = Literal["", "own", "wide"]


@dataclass(frozen=True)
class Pass:
    """A graph, the arrays of it that are gradients, and how many outputs each evaluation before the last has.

    `flat`: by gradient its copy for the exchange, where it needs one and the pass makes it.
    """

    graph: Graph
    gradients: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    flat: Mapping[int, int] = field(default_factory=dict)


class LayerPasses:
    """The parts of a described model, on micro-batches of (rows, width). NotTraceable where they cannot be run so.

    Units are numbered as in the specification, layers from 1. `chunk`: tokens of the loss at a time. Rows are traced as
    one document each, which needs the most.
    """

    def __init__(
        self, spec: ModelSpec, rows: int, width: int, chunk: int, kernels: Kernels | None = None
    ) -> None:
        if spec.module is None:
            raise NotTraceable("there is no module to trace")
        self._spec, self._model = spec, spec.module
        self._blocks = TracedBlocks()
        self._in_blocks: dict[tuple[int, ...], list[Shapes]] = {}  # by layers the calls that are in blocks
        self._segmented: set[object] = set()  # kinds of layers whose experts' gradients need stand-ins
        owner, key, _ = find_layers(self._model, spec.name)
        self._list = owner, key
        self._places = {t.name: _place(self._model, t.name) for t in spec.units[0].tensors}
        # What layers are given may have the embedding's dtype; a model that is planned has not got its own yet.
        root = {t.name: mx.zeros(t.shape, _dtype(t)) for t in spec.units[0].tensors}
        with _in_peace(owner, key) as layers, self._put_back(spec.units[0].tensors):
            for name, array in root.items():
                container, place = self._places[name]
                container[place] = array
            self._slotted = SlottedModel(self._model, spec.name)
            try:
                hidden, given = self._slotted.capture(mx.zeros((rows, width), mx.int32))
                if kernels is not None:
                    kernels = replace(kernels, in_blocks=self._blocks.attend)
                self._by_pattern = ByPattern(layers, kernels, self._told(layers, kernels, width))
                self._given = self._by_pattern.settled(hidden, given)
            except Exception as error:  # foreign code on a model that need not be one that trains
                raise NotTraceable(reason_of(error)) from None
        self._layers: list[nn.Module] = layers
        self._places |= {
            t.name: _place(layer, t.name.removeprefix(f"{unit.name}."))
            for unit, layer in zip(spec.units[1:], layers, strict=True)
            for t in unit.tensors
        }
        dtype = getattr(mx, spec.dtype)
        self._hidden = mx.zeros(hidden.shape, dtype)
        self._chunk, self._positions = chunk, max(chunk // rows, 1)
        head, _ = root_parts(spec)
        self._heads = [t for kind in ("trainable", "small") for t in head if t.kind == kind]
        flat = [a for _, a in tree_flatten([[g.positional, g.keywords] for g in self._given])]
        self._arguments = {id(a): a for a in flat if isinstance(a, mx.array)}
        self._now: dict[int, mx.array] = {}  # by id of an argument what stands for it
        self._bound: dict[str, mx.array] = {}
        self._experts = TracedExperts()
        self._products = TracedProducts(self._blocks)

    def _told(
        self, layers: Sequence[nn.Module], kernels: Kernels | None, width: int
    ) -> list[Pattern | None] | None:
        """The layers' patterns, seen on rows that are long enough to tell: a mask of long ones is never made."""
        if kernels is None or width <= kernels.short:
            return None
        seen = telling_width(self._spec.text_config, width)
        question = "patterns", seen
        if question not in self._spec.known:
            hidden, given = self._slotted.capture(mx.zeros((1, seen), mx.int32))
            self._spec.known[question] = ByPattern(layers, kernels).patterns(hidden, given)
        found: list[Pattern | None] = self._spec.known[question]
        return found

    @property
    def argument_bytes(self) -> int:
        """Bytes of the arrays that layers are given besides the hidden state (masks)."""
        return sum(a.nbytes for a in self._arguments.values())

    def variant(self, unit: int) -> tuple[object, ...]:
        """What tells layers with alike tensors apart: what they are given, and their switches."""
        layer, given = self._layers[unit - 1], self._given[unit - 1]
        kinds = [
            (path, tuple(a.shape), str(a.dtype)) if isinstance(a, mx.array) else (path, str(a), "")
            for path, a in tree_flatten([list(given.positional), given.keywords])
        ]
        switches = [
            (path, name, value)
            for path, module in layer.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, bool) and not name.startswith("_")
        ]
        return type(layer), given.pattern, tuple(kinds), tuple(switches)

    def pattern(self, unit: int) -> Pattern | None:
        """By which pattern a layer attends; None where it has a mask, or does not attend."""
        return self._given[unit - 1].pattern

    @property
    def masked(self) -> bool:
        """Whether a layer attends by a mask, whose scores are one array."""
        return any(
            g.pattern is None and given_mask(layer, g) is not None
            for layer, g in zip(self._layers, self._given, strict=True)
        )

    def forward(self, unit: int) -> Pass:
        """A layer's forward; the hidden state stays with the caller."""
        return Pass(self._through_graph([unit]))

    def products(self, unit: int) -> list[Product]:
        """What a layer's run computes that could be kept, and whether its vjp computes it again."""
        return self._products.told(self.backward(unit, adds="", kept=None).graph)

    def backward(self, unit: int, *, adds: Adds, flat: bool = False, kept: Sequence[int] | None = ()) -> Pass:
        """A layer's vjp; `flat`: its gradients in the wire's dtype and flat, too, as the exchange takes them; `kept`:
        products whose results are there (None: all), as its last sources."""
        self._products.wanted = kept

        def body(hidden: mx.array, cotangent: mx.array, *sums: mx.array) -> list[mx.array]:
            def run(*arrays: mx.array) -> list[mx.array]:
                self._begin(arrays[len(trained) + 1 :])
                self._bind(trained, arrays)
                return [self._call(unit, arrays[len(trained)]), *self._blocks.came_in()]

            trained, taps = self._primals([unit])
            primals = [*(self._bound[t.name] for t in trained), hidden, *taps]
            _, found = mx.vjp(run, primals, [cotangent, *self._blocks.cotangents])
            every = self._trained([unit])
            made = self._added(sums, [unit], trained, found)
            added, others = made[: len(every)], made[len(every) :]
            wires = [(a, _wire(t)) for a, t in zip(added, every, strict=True) if flat]
            copies = [a.astype(w).flatten() for a, w in wires if _is_copied(a, w)]
            return [found[len(trained)], *added, *copies, *self._products.extra(), *others]

        return self._differentiated([unit], body, adds=adds, besides=[self._hidden])

    def head(self) -> Pass:
        """The loss and its gradients, an evaluation for each chunk of positions: of two at most, for more are alike."""

        def body(hidden: mx.array, *batch: mx.array) -> list[mx.array]:
            return [array for one in self._chunks(hidden, batch) for array in one]

        two = mx.zeros_like(self._hidden[:, : 2 * self._positions])
        return self._of_chunks(self._graph([0], [], [two, *self._batch(two)], body), two.shape[1])

    def tail(self, units: Sequence[int], *, adds: Adds) -> Pass:
        """The loss and the vjp of layers that are not recomputed, in order. The chunks of the loss are evaluated first,
        with the first of them the layers' forward; what the head's gradients are added to, with the backward."""

        two = min(2 * self._positions, self._hidden.shape[1])  # of the chunks that follow nothing is new

        def body(hidden: mx.array, *rest: mx.array) -> list[mx.array]:
            batch, roots, sums = rest[:3], rest[3 : 3 + len(root_sums)], rest[3 + len(root_sums) :]

            def run(*arrays: mx.array) -> tuple[mx.array, ...]:
                self._begin(arrays[len(trained) + 1 :])
                self._bind(trained, arrays)
                state = self._through(units, arrays[len(trained)])
                chunks = list(self._chunks(mx.stop_gradient(state)[:, :two], [x[:, :two] for x in batch]))
                parts = [part for *_, part in chunks]
                parts += [mx.zeros_like(state[:, two:])] * (two < state.shape[1])
                cotangent = mx.stop_gradient(joined_chunks(parts))
                surrogate = (state * cotangent).sum()
                for array, own in zip(self._blocks.came_in(), self._blocks.cotangents, strict=True):
                    surrogate = surrogate + (array * own).sum()
                return surrogate, *(array for one in chunks for array in one)

            trained, taps = self._primals(units)
            primals = [*(self._bound[t.name] for t in trained), hidden, *taps]
            (_, *chunks), found = mx.value_and_grad(run, argnums=tuple(range(len(primals))))(*primals)
            last = chunks[len(chunks) - 1 - len(self._heads) : -1]
            heads = [a.astype(mx.float32) + g.astype(mx.float32) for a, g in zip(roots, last, strict=False)]
            return [*chunks, found[len(trained)], *heads, *self._added(sums, units, trained, found)]

        own = adds == "own" and two <= self._positions  # chunks are added in fp32
        root_sums = [mx.zeros(t.shape, _dtype(t) if own else mx.float32) for t in self._heads if adds]
        besides = [*self._batch(self._hidden), *root_sums]
        traced = self._differentiated(units, body, adds=adds, besides=besides, head=True)
        chunks = self._of_chunks(traced.graph, two)
        heads = traced.graph.outputs[sum(chunks.before) + 1 :][: len(root_sums)]
        return replace(chunks, gradients=(*chunks.gradients, *heads, *traced.gradients))

    # ---- head

    def _chunks(self, hidden: mx.array, batch: Arrays) -> Iterator[list[mx.array]]:
        """By chunk the losses so far, the head's gradients so far and that by the chunk of `hidden`."""
        heads = [self._bound[t.name] for t in self._heads]
        inputs, targets, mask = batch
        given = hidden, (inputs, targets, mask), mx.array(1.0), self._chunk
        for loss, sums, part in head_chunks(self._call_head, heads, *given):
            yield [loss, *sums, part]

    def _call_head(self, arrays: Arrays, hidden: mx.array, tokens: mx.array) -> mx.array:
        self._bind(self._heads, arrays)
        self._slotted.put_slots()
        return self._slotted.head(tokens, hidden)

    def _batch(self, hidden: mx.array) -> list[mx.array]:
        """Inputs, targets and mask."""
        shape = hidden.shape[:2]
        return [mx.zeros(shape, mx.int32), mx.zeros(shape, mx.int32), mx.zeros(shape)]

    def _of_chunks(self, graph: Graph, width: int) -> Pass:
        """A graph whose first outputs are those of the chunks of `width` positions, each of them an evaluation."""
        chunks, size = -(-width // self._positions), len(self._heads) + 2
        gradients = tuple(a for n in range(chunks) for a in graph.outputs[n * size + 1 : (n + 1) * size - 1])
        more = len(graph.outputs) > chunks * size
        return Pass(graph, gradients, (size,) * (chunks - (not more)))

    # ---- what is differentiated

    def _differentiated(
        self, units: Sequence[int], body: Body, *, adds: Adds, besides: Arrays = (), head: bool = False
    ) -> Pass:
        trained = self._trained(units)
        sums = [mx.zeros(t.shape, _dtype(t) if adds == "own" else mx.float32) for t in trained]
        free = [self._hidden, *besides, *(sums if adds else ())]
        bound = [*units, 0] if head else units
        with self._blocks.differentiated(self._calls_in_blocks(units)):
            graph = self._with_experts(
                units, lambda: self._blocks.put_together(self._graph(bound, free, [], body))
            )
        if not head:
            graph = self._products.kept_in(graph)
        start = len(graph.outputs) - len(trained) if head else 1
        gradients, flat = graph.outputs[start : start + len(trained)], graph.outputs[start + len(trained) :]
        copied = [
            a
            for a, t in zip(gradients, trained, strict=True)
            if len(t.shape) != 1 or graph.items[a] != _wire(t).size
        ]
        return Pass(graph, tuple(gradients), flat=dict(zip(copied, flat, strict=bool(flat))))

    def _with_experts(self, units: Sequence[int], trace: Callable[[], Graph]) -> Graph:
        """What `trace` gives, with stand-ins for the experts' gradients where MLX has no word for them."""
        kinds = {self._spec.units[u].kind for u in units}
        if not kinds & self._segmented:
            try:
                return trace()
            except NotTraceable as error:
                if "SegmentedMM" not in str(error):
                    raise
            if len(kinds) == 1:
                self._segmented |= kinds
        with self._experts.standing_in():
            self._through_graph(units)
            return self._experts.taken_out(trace())

    def _calls_in_blocks(self, units: Sequence[int]) -> list[Shapes]:
        if all(self.pattern(u) is None for u in units):
            return []
        if (*units,) not in self._in_blocks:
            self._through_graph(units)
        return self._in_blocks[*units,]

    def _trained(self, units: Sequence[int]) -> list[TensorSpec]:
        """In the order in which the engine differentiates: by unit, segment by segment."""
        return [
            t
            for u in units
            for kind in ("trainable", "small")
            for t in self._spec.units[u].tensors
            if t.kind == kind
        ]

    def _primals(self, units: Sequence[int]) -> tuple[list[TensorSpec], list[mx.array]]:
        """The tensors by which is differentiated, and summands of the experts' products where those stand in."""
        trained = self._trained(units)
        if not self._experts.stand_in:
            return trained, self._blocks.summands
        stacked = {
            f"{self._spec.units[u].name}.{n}" for u in units for n in stacked_tensors(self._layers[u - 1])
        }
        for t in trained:
            if t.name in stacked:
                self._bind([t], [mx.stop_gradient(self._bound[t.name])])
        return [t for t in trained if t.name not in stacked], [
            *self._experts.summands(),
            *self._blocks.summands,
        ]

    def _added(
        self, sums: Arrays, units: Sequence[int], trained: Sequence[TensorSpec], found: Sequence[mx.array]
    ) -> list[mx.array]:
        """The gradients of all trained tensors, added to `sums` where there are any; then those of `_blocks`."""
        by_name = dict(zip((t.name for t in trained), found, strict=False))
        cotangents = found[len(trained) + 1 :]
        experts = len(self._experts.shapes)
        missing = [t for t in self._trained(units) if t.name not in by_name]
        by_name |= self._experts.gradients(missing, cotangents[:experts])
        gradients = [by_name[t.name] for t in self._trained(units)]
        if sums:
            gradients = [
                a.astype(mx.float32) + g.astype(mx.float32) for a, g in zip(sums, gradients, strict=True)
            ]
        return [*gradients, *self._blocks.gradients(cotangents[experts:])]

    # ---- layers

    def _graph(self, units: Sequence[int], free: Arrays, held: Arrays, body: Body) -> Graph:
        """The graph of `body(*free, *held)`. Also held are the layers' tensors and what they are given."""
        tensors = [t for u in units for t in self._spec.units[u].tensors]
        weights = [mx.zeros(t.shape, getattr(mx, t.dtype)) for t in tensors]
        arguments, own = list(self._arguments.values()), len(free) + len(held)
        taps = [*self._experts.placeholders(), *self._blocks.placeholders()]

        def run(*arrays: mx.array) -> list[mx.array]:
            self._bind(tensors, arrays[own:])
            rest = arrays[own + len(tensors) :]
            self._now = dict(zip(self._arguments, rest, strict=False))
            self._begin(arrays[len(arrays) - len(taps) :])
            return body(*arrays[:own])

        given = [*free, *held, *weights, *arguments, *taps]
        with self._put_back(tensors), _in_peace(*self._list):
            return graph_of(run, given, range(len(free), len(given)))

    @contextmanager
    def _put_back(self, tensors: Sequence[TensorSpec]) -> Iterator[None]:
        """Afterwards the model has the arrays that it has now."""
        before = [(*self._places[t.name], self._places[t.name][0][self._places[t.name][1]]) for t in tensors]
        try:
            yield
        finally:
            for container, key, array in before:
                container[key] = array

    def _through_graph(self, units: Sequence[int]) -> Graph:
        """That of the layers' forward in a row."""
        graph = self._graph(units, [], [self._hidden], lambda x: [self._through(units, x)])
        self._in_blocks[*units,] = self._blocks.seen()
        return graph

    def _begin(self, placeholders: Arrays) -> None:
        """A call of layers: what stands in for primitives gets these."""
        experts = len(self._experts.shapes)
        self._experts.begin(placeholders[:experts])
        self._blocks.begin(placeholders[experts:])

    def _bind(self, tensors: Sequence[TensorSpec], arrays: Arrays) -> None:
        for t, array in zip(tensors, arrays, strict=False):
            self._bound[t.name] = array
            container, key = self._places[t.name]
            container[key] = array

    def _through(self, units: Sequence[int], hidden: mx.array) -> mx.array:
        for unit in units:
            hidden = self._call(unit, hidden)
        return hidden

    def _call(self, unit: int, hidden: mx.array) -> mx.array:
        given = self._given[unit - 1]
        positional, keywords = tree_map(
            lambda a: self._now.get(id(a), a), [list(given.positional), given.keywords]
        )
        given = replace(given, positional=tuple(positional), keywords=keywords)
        with self._products.watch():
            output = hidden_of(self._by_pattern.call(self._layers[unit - 1], hidden, given))
        if not isinstance(output, mx.array):
            raise NotTraceable(f"a layer returns {type(output).__name__}")
        return output


def _dtype(tensor: TensorSpec) -> mx.Dtype:
    """The dtype in which a tensor computes."""
    found: mx.Dtype = getattr(mx, tensor.dtype)
    return found


def _wire(tensor: TensorSpec) -> mx.Dtype:
    """The dtype in which a tensor's gradient is exchanged."""
    return mx.float32 if tensor.kind == "small" else _dtype(tensor)


def _is_copied(gradient: mx.array, wire: mx.Dtype) -> bool:
    """Whether a gradient is another array once it is flat and in the wire's dtype."""
    return gradient.ndim != 1 or gradient.dtype != wire


def _place(layer: nn.Module, name: str) -> tuple[Any, Any]:
    """The container and key of a tensor by its dotted path."""
    *path, last = name.split(".")
    container: Any = layer
    for part in path:
        container = container[int(part)] if isinstance(container, list) else container[part]
    return container, int(last) if isinstance(container, list) else last


@contextmanager
def _in_peace(owner: nn.Module, key: str) -> Iterator[list[nn.Module]]:
    """The real layers in a model's list that may have slots in it; what was there and MLX's randomness come back."""
    state: Any = mx.random.state
    before, (high, low) = owner[key], state[0].tolist()
    real = [layer.__dict__["_layer"] if type(layer) is Slot else layer for layer in before]
    owner[key] = list(real)
    try:
        yield real
    finally:
        owner[key] = before
        mx.random.seed(high << 32 | low)
