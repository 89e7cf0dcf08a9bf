"""A described model called on stand-ins: arrays without data, in the dtypes that the specification names.

Layers get the arguments that the model gives them (`layers.SlottedModel`), and attend by the patterns by which they do
in training. The module may be in use: its arrays, its list of layers and MLX's random state are put back.

What `mx.export_function` has no word for is stood for: `traced_experts` and `attention.traced`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_empire.model.attention.by_pattern import ByPattern
from mlx_empire.model.attention.patterns import Pattern, telling_width
from mlx_empire.model.attention.segments import Kernels
from mlx_empire.model.attention.traced import Shapes, TracedBlocks
from mlx_empire.model.build import find_layers, reason_of
from mlx_empire.model.graph import Graph
from mlx_empire.model.layer_graph import NotTraceable, graph_of
from mlx_empire.model.layers import Slot, SlottedModel, given_mask, hidden_of
from mlx_empire.model.spec import ModelSpec, TensorSpec
from mlx_empire.model.traced_experts import TracedExperts, stacked_tensors
from mlx_empire.model.traced_products import TracedProducts

Arrays = Sequence[mx.array]
Body = Callable[..., list[mx.array]]


@dataclass(frozen=True)
class Forward:
    """A forward's graph, what comes in and out of its attention in blocks, and its experts' sorted products."""

    graph: Graph
    in_blocks: list[Shapes]
    products: list[tuple[int, ...]]


class TracedModel:
    """The layers and the head of a described model, on micro-batches of (rows, width). NotTraceable where they cannot
    be run in parts.

    Units are numbered as in the specification, layers from 1. Rows are traced as one document each, which needs the
    most. `hidden`: the state that a layer is given. `bound`: by name the array that stands for a tensor now.
    """

    def __init__(self, spec: ModelSpec, rows: int, width: int, kernels: Kernels | None = None) -> None:
        if spec.module is None:
            raise NotTraceable("there is no module to trace")
        self._spec, self._model = spec, spec.module
        self.blocks = TracedBlocks()
        self._forwards: dict[tuple[int, ...], Forward] = {}
        self._calls: dict[
            tuple[object, ...], list[Shapes]
        ] = {}  # by kind of layer of its attention in blocks
        self._segmented: set[object] = set()  # kinds of layers whose experts' gradients need stand-ins
        owner, key, _ = find_layers(self._model, spec.name)
        self._list = owner, key
        self._places = {t.name: _place(self._model, t.name) for t in spec.units[0].tensors}
        # What layers are given may have the embedding's dtype; a model that is planned has not got its own yet.
        root = spec.units[0].tensors
        self.bound: dict[str, mx.array] = {}
        with _in_peace(owner, key) as layers, self._put_back(root):
            self.bind(root, _zeros(root))
            self._slotted = SlottedModel(self._model, spec.name)
            try:
                hidden, given = self._slotted.capture(mx.zeros((rows, width), mx.int32))
                if kernels is not None:
                    kernels = replace(kernels, in_blocks=self.blocks.attend)
                self._by_pattern = ByPattern(layers, kernels, self._told(layers, kernels, rows, width))
                self._given = self._by_pattern.settled(hidden, given)
            except Exception as error:  # foreign code on a model that need not be one that trains
                raise NotTraceable(reason_of(error)) from None
        self.layers: list[nn.Module] = layers
        self._places |= {
            t.name: _place(layer, t.name.removeprefix(f"{unit.name}."))
            for unit, layer in zip(spec.units[1:], layers, strict=True)
            for t in unit.tensors
        }
        self.hidden = mx.zeros(hidden.shape, getattr(mx, spec.dtype))
        flat = [a for _, a in tree_flatten([[g.positional, g.keywords] for g in self._given])]
        self._arguments = {id(a): a for a in flat if isinstance(a, mx.array)}
        self._now: dict[int, mx.array] = {}  # by id of an argument what stands for it
        self.experts = TracedExperts()
        self.products = TracedProducts(self.blocks)

    def _told(
        self, layers: Sequence[nn.Module], kernels: Kernels | None, rows: int, width: int
    ) -> list[Pattern | None] | None:
        """The layers' patterns, seen on rows that are long enough to tell: a mask of long ones is never made."""
        if kernels is None or width <= kernels.short:
            return None
        seen = telling_width(self._spec.text_config, width)
        question = "patterns", seen
        if question not in self._spec.known:
            hidden, given = self._slotted.capture(mx.zeros((rows, seen), mx.int32))
            self._spec.known[question] = ByPattern(layers, kernels).patterns(hidden, given)
        found: list[Pattern | None] = self._spec.known[question]
        return found

    @property
    def argument_bytes(self) -> int:
        """Bytes of the arrays that layers are given besides the hidden state (masks)."""
        return sum(a.nbytes for a in self._arguments.values())

    def variant(self, unit: int) -> tuple[object, ...]:
        """What tells layers with alike tensors apart: what they are given, and their switches."""
        layer, given = self.layers[unit - 1], self._given[unit - 1]
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
            for layer, g in zip(self.layers, self._given, strict=True)
        )

    # ---- graphs

    def graph(self, units: Sequence[int], free: Arrays, held: Arrays, body: Body) -> Graph:
        """The graph of `body(*free, *held)`. Also held are the layers' tensors and what they are given."""
        tensors = [t for u in units for t in self._spec.units[u].tensors]
        arguments, own = list(self._arguments.values()), len(free) + len(held)
        taps = [*self.experts.placeholders(), *self.blocks.placeholders()]

        def run(*arrays: mx.array) -> list[mx.array]:
            self.bind(tensors, arrays[own:])
            rest = arrays[own + len(tensors) :]
            self._now = dict(zip(self._arguments, rest, strict=False))
            self.begin(arrays[len(arrays) - len(taps) :])
            return body(*arrays[:own])

        given = [*free, *held, *_zeros(tensors), *arguments, *taps]
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

    def forward(self, units: Sequence[int]) -> Forward:
        """The layers' forward in a row, traced once."""
        if (*units,) not in self._forwards:
            with self.experts.watching():
                graph = self.graph(units, [], [self.hidden], lambda x: [self.through(units, x)])
                self._forwards[*units,] = Forward(graph, self.blocks.seen(), list(self.experts.seen))
        return self._forwards[*units,]

    def with_experts(self, units: Sequence[int], trace: Callable[[], Graph]) -> Graph:
        """What `trace` gives, with stand-ins for the experts' gradients where MLX has no word for them."""
        kinds = {self._spec.units[u].kind for u in units}
        if not kinds & self._segmented and not self._trains_sorted(units):
            try:
                return trace()
            except NotTraceable as error:
                if "SegmentedMM" not in str(error):
                    raise
            if len(kinds) == 1:
                self._segmented |= kinds
        with self.experts.standing_in(self.forward(units).products):
            return self.experts.taken_out(trace())

    def _trains_sorted(self, units: Sequence[int]) -> bool:
        """Whether stacked experts are trained on sorted tokens."""
        trained = {t.name for u in units for t in self._spec.units[u].tensors if t.trainable}
        stacked = {
            f"{self._spec.units[u].name}.{n}" for u in units for n in stacked_tensors(self.layers[u - 1])
        }
        return bool(trained & stacked) and bool(self.forward(units).products)

    def calls_in_blocks(self, units: Sequence[int]) -> list[Shapes]:
        """What comes in and out of the layers' attention in blocks."""
        return [call for u in units if self.pattern(u) is not None for call in self._in_blocks(u)]

    def _in_blocks(self, unit: int) -> list[Shapes]:
        """Those of one layer; alike ones have the same."""
        kind = self._spec.units[unit].kind, self.variant(unit)
        if kind not in self._calls:
            self._calls[kind] = self.forward([unit]).in_blocks
        return self._calls[kind]

    def begin(self, placeholders: Arrays) -> None:
        """A call of layers: what stands in for primitives gets these."""
        experts = len(self.experts.shapes)
        self.experts.begin(placeholders[:experts])
        self.blocks.begin(placeholders[experts:])

    def bind(self, tensors: Sequence[TensorSpec], arrays: Arrays) -> None:
        """Arrays stand for tensors from here on."""
        for t, array in zip(tensors, arrays, strict=False):
            self.bound[t.name] = array
            container, key = self._places[t.name]
            container[key] = array

    def through(self, units: Sequence[int], hidden: mx.array) -> mx.array:
        """What the last of the layers returns."""
        for unit in units:
            hidden = self.call(unit, hidden)
        return hidden

    def call(self, unit: int, hidden: mx.array) -> mx.array:
        """What a layer returns. NotTraceable where that is no array."""
        given = self._given[unit - 1]
        positional, keywords = tree_map(
            lambda a: self._now.get(id(a), a), [list(given.positional), given.keywords]
        )
        given = replace(given, positional=tuple(positional), keywords=keywords)
        with self.products.watch():
            output = hidden_of(self._by_pattern.call(self.layers[unit - 1], hidden, given))
        if not isinstance(output, mx.array):
            raise NotTraceable(f"a layer returns {type(output).__name__}")
        return output

    def head(self, hidden: mx.array, tokens: mx.array) -> mx.array:
        """The logits of what the last layer returned; `tokens` only give the shape."""
        self._slotted.put_slots()
        return self._slotted.head(tokens, hidden)


def dtype_of(tensor: TensorSpec) -> mx.Dtype:
    """The dtype in which a tensor computes."""
    found: mx.Dtype = getattr(mx, tensor.dtype)
    return found


def _zeros(tensors: Sequence[TensorSpec]) -> list[mx.array]:
    """Arrays without data, in the dtypes in which the tensors compute."""
    return [mx.zeros(t.shape, dtype_of(t)) for t in tensors]


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
