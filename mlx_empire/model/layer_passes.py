"""The passes of layers and head, traced as the engine runs them: a layer's forward and vjp, and the loss with the vjp
of an un-recomputed tail.

How the model is called on arrays without data: `traced_model`. A pass is traced once, alone; what differs from
micro-batch to micro-batch is changed in its graph: the sums that gradients are added to (`traced_sums`), the products
that are kept (`traced_products`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import mlx.core as mx

from mlx_empire.model.attention.segments import Kernels
from mlx_empire.model.closed_forms import root_parts
from mlx_empire.model.distillation import Distillation
from mlx_empire.model.graph import Graph
from mlx_empire.model.head_loss import head_chunks, joined_chunks
from mlx_empire.model.spec import ModelSpec, TensorSpec
from mlx_empire.model.traced_experts import stacked_tensors
from mlx_empire.model.traced_model import Arrays, Body, TracedModel, dtype_of
from mlx_empire.model.traced_products import Product, TracedProduct, kept_in, told
from mlx_empire.model.traced_sums import with_flat_copies, with_sums

# What a pass adds its gradients to: nothing, those of one micro-batch in their own dtypes, or sums in fp32.
Adds = Literal["", "own", "wide"]


@dataclass(frozen=True)
class Traced:
    """A pass alone. Its last outputs are the `gradients`, in the order of the trained tensors, and before these come
    `before`; so many of its given arrays are `free`."""

    graph: Graph
    before: Sequence[int]
    gradients: Sequence[int]
    free: int
    products: Sequence[TracedProduct] = ()


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

    Units are numbered as in the specification, layers from 1. `chunk`: tokens of the loss at a time. `model`: what is
    called. `how` a teacher's values count in the loss.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rows: int,
        width: int,
        chunk: int,
        kernels: Kernels | None = None,
        how: Distillation | None = None,
    ) -> None:
        self.model = TracedModel(spec, rows, width, kernels)
        self._spec, self._hidden, self._how = spec, self.model.hidden, how
        self._blocks, self._experts, self._products = (
            self.model.blocks,
            self.model.experts,
            self.model.products,
        )
        self._traced: dict[tuple[int, ...], Traced] = {}  # by layers, of tails those with 0 for the head
        self._chunk, self._positions = chunk, max(chunk // rows, 1)
        head, _ = root_parts(spec)
        self._heads = [t for kind in ("trainable", "small") for t in head if t.kind == kind]

    def forward(self, unit: int) -> Pass:
        """A layer's forward; the hidden state stays with the caller."""
        return Pass(self.model.forward([unit]).graph)

    def products(self, unit: int) -> list[Product]:
        """What a layer's run computes that could be kept, and whether its vjp computes it again."""
        traced = self._backward(unit)
        return told(traced.graph, traced.products)

    def backward(self, unit: int, *, adds: Adds, flat: bool = False, kept: Sequence[int] = ()) -> Pass:
        """A layer's vjp; `flat`: its gradients in the wire's dtype and flat, too, as the exchange takes them; `kept`:
        products whose results are there, as its last sources."""
        traced, trained = self._backward(unit), self._trained([unit])
        graph = kept_in(traced.graph, [one for one in traced.products if one.product.number in kept])
        gradients, copies = traced.gradients, dict[int, int]()
        if adds:
            graph, gradients = with_sums(graph, gradients, _sums(trained, adds), traced.free)
        if flat:
            graph, copies = with_flat_copies(graph, gradients, [_wire(t) for t in trained])
        graph = replace(graph, outputs=[*traced.before, *gradients, *copies.values()])
        return Pass(graph, tuple(gradients), flat=copies)

    def _backward(self, unit: int) -> Traced:
        """A layer's vjp alone."""

        def body(hidden: mx.array, cotangent: mx.array) -> list[mx.array]:
            def run(*arrays: mx.array) -> list[mx.array]:
                self.model.begin(arrays[len(trained) + 1 :])
                self.model.bind(trained, arrays)
                return [self.model.call(unit, arrays[len(trained)]), *self._blocks.came_in()]

            trained, taps = self._primals([unit])
            primals = [*(self.model.bound[t.name] for t in trained), hidden, *taps]
            _, found = mx.vjp(run, primals, [cotangent, *self._blocks.cotangents])
            gradients, others = self._gradients([unit], trained, found)
            return [found[len(trained)], *gradients, *self._products.extra(), *others]

        return self._once((unit,), body, besides=[self._hidden])

    def head(self) -> Pass:
        """The loss and its gradients, an evaluation for each chunk of positions: of two at most, for more are alike."""

        def body(hidden: mx.array, *batch: mx.array) -> list[mx.array]:
            return [array for one in self._chunks(hidden, batch) for array in one]

        two = mx.zeros_like(self._hidden[:, : 2 * self._positions])
        return self._of_chunks(self.model.graph([0], [], [two, *self._batch(two)], body), two.shape[1])

    def tail(self, units: Sequence[int], *, adds: Adds) -> Pass:
        """The loss and the vjp of layers that are not recomputed, in order. The chunks of the loss are evaluated first,
        with the first of them the layers' forward; what the head's gradients are added to, with the backward."""

        two = min(2 * self._positions, self._hidden.shape[1])  # of the chunks that follow nothing is new
        traced, trained = self._tail(units, two), self._trained(units)
        chunks = self._of_chunks(traced.graph, two)
        if not adds:
            return replace(chunks, gradients=(*chunks.gradients, *traced.gradients))
        # Chunks are added in fp32: where there are several, so is the head's sum already.
        own = adds == "own" and two <= self._positions
        sums = [*_sums(self._heads, "own" if own else "wide"), *_sums(trained, adds)]
        ended = sum(chunks.before)
        last = traced.graph.outputs[ended - 1 - len(self._heads) : ended - 1]
        graph, made = with_sums(traced.graph, [*last, *traced.gradients], sums, traced.free)
        graph = replace(graph, outputs=[*traced.before, *made])
        return Pass(graph, (*chunks.gradients, *made), chunks.before)

    def _tail(self, units: Sequence[int], two: int) -> Traced:
        """The pass of a tail alone, with the loss of the first `two` positions."""

        def body(hidden: mx.array, *batch: mx.array) -> list[mx.array]:
            def run(*arrays: mx.array) -> tuple[mx.array, ...]:
                self.model.begin(arrays[len(trained) + 1 :])
                self.model.bind(trained, arrays)
                state = self.model.through(units, arrays[len(trained)])
                chunks = list(self._chunks(mx.stop_gradient(state)[:, :two], [x[:, :two] for x in batch]))
                parts = [part for *_, part in chunks]
                parts += [mx.zeros_like(state[:, two:])] * (two < state.shape[1])
                cotangent = mx.stop_gradient(joined_chunks(parts))
                surrogate = (state * cotangent).sum()
                for array, own in zip(self._blocks.came_in(), self._blocks.cotangents, strict=True):
                    surrogate = surrogate + (array * own).sum()
                return surrogate, *(array for one in chunks for array in one)

            trained, taps = self._primals(units)
            primals = [*(self.model.bound[t.name] for t in trained), hidden, *taps]
            (_, *chunks), found = mx.value_and_grad(run, argnums=tuple(range(len(primals))))(*primals)
            gradients, others = self._gradients(units, trained, found)
            return [*chunks, found[len(trained)], *gradients, *others]

        return self._once((*units, 0), body, besides=self._batch(self._hidden))

    # ---- head

    def _chunks(self, hidden: mx.array, batch: Arrays) -> Iterator[list[mx.array]]:
        """By chunk the losses so far, the head's gradients so far and that by the chunk of `hidden`."""
        heads = [self.model.bound[t.name] for t in self._heads]
        given = hidden, batch, mx.array(1.0), self._chunk, self._how
        for loss, sums, part in head_chunks(self._logits, heads, *given):
            yield [loss, *sums, part]

    def _logits(self, arrays: Arrays, hidden: mx.array, tokens: mx.array) -> mx.array:
        self.model.bind(self._heads, arrays)
        return self.model.head(hidden, tokens)

    def _batch(self, hidden: mx.array) -> list[mx.array]:
        """Inputs, targets and mask, and a teacher's values."""
        shape = hidden.shape[:2]
        batch = [mx.zeros(shape, mx.int32), mx.zeros(shape, mx.int32), mx.zeros(shape)]
        if self._how is None:
            return batch
        top = self._how.top
        return [*batch, mx.zeros((*shape, top), mx.int32), mx.zeros((*shape, top + 1), mx.float16)]

    def _of_chunks(self, graph: Graph, width: int) -> Pass:
        """A graph whose first outputs are those of the chunks of `width` positions, each of them an evaluation."""
        chunks, size = -(-width // self._positions), len(self._heads) + 2
        gradients = tuple(a for n in range(chunks) for a in graph.outputs[n * size + 1 : (n + 1) * size - 1])
        more = len(graph.outputs) > chunks * size
        return Pass(graph, gradients, (size,) * (chunks - (not more)))

    # ---- what is differentiated

    def _once(self, key: tuple[int, ...], body: Body, *, besides: Arrays) -> Traced:
        """`body` of layers, where 0 is among them with the head, traced once. It is given the hidden state and
        `besides`."""
        if key not in self._traced:
            self._traced[key] = self._differentiated(key, body, besides)
        return self._traced[key]

    def _differentiated(self, key: tuple[int, ...], body: Body, besides: Arrays) -> Traced:
        free, units = [self._hidden, *besides], [u for u in key if u]
        with self._blocks.differentiated(self.model.calls_in_blocks(units)):
            graph = self.model.with_experts(
                units, lambda: self._blocks.put_together(self.model.graph(key, free, [], body))
            )
        products: list[TracedProduct] = []
        if 0 not in key:
            graph, products = self._products.taken_out(graph)
        first = len(graph.outputs) - len(self._trained(units))
        return Traced(graph, graph.outputs[:first], graph.outputs[first:], len(free), products)

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
            f"{self._spec.units[u].name}.{n}"
            for u in units
            for n in stacked_tensors(self.model.layers[u - 1])
        }
        for t in trained:
            if t.name in stacked:
                self.model.bind([t], [mx.stop_gradient(self.model.bound[t.name])])
        return [t for t in trained if t.name not in stacked], [
            *self._experts.summands(),
            *self._blocks.summands,
        ]

    def _gradients(
        self, units: Sequence[int], trained: Sequence[TensorSpec], found: Sequence[mx.array]
    ) -> tuple[list[mx.array], list[mx.array]]:
        """The gradients of all trained tensors, and those of `_blocks`."""
        by_name = dict(zip((t.name for t in trained), found, strict=False))
        cotangents = found[len(trained) + 1 :]
        experts = len(self._experts.shapes)
        missing = [t for t in self._trained(units) if t.name not in by_name]
        by_name |= self._experts.gradients(missing, cotangents[:experts])
        return [by_name[t.name] for t in self._trained(units)], self._blocks.gradients(cotangents[experts:])


def _sums(tensors: Sequence[TensorSpec], adds: Adds) -> list[mx.array]:
    """What gradients of these are added to."""
    return [mx.zeros(t.shape, dtype_of(t) if adds == "own" else mx.float32) for t in tensors]


def _wire(tensor: TensorSpec) -> mx.Dtype:
    """The dtype in which a tensor's gradient is exchanged."""
    return mx.float32 if tensor.kind == "small" else dtype_of(tensor)
