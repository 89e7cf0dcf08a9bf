"""The passes of layers and head, traced as the engine runs them: a layer's forward and vjp, and the loss with the vjp
of an un-recomputed tail.

How the model is called on arrays without data: `traced_model`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import mlx.core as mx

from mlx_empire.model.attention.segments import Kernels
from mlx_empire.model.closed_forms import root_parts
from mlx_empire.model.head_loss import head_chunks, joined_chunks
from mlx_empire.model.liveness import Graph
from mlx_empire.model.spec import ModelSpec, TensorSpec
from mlx_empire.model.traced_experts import stacked_tensors
from mlx_empire.model.traced_model import Arrays, Body, TracedModel, dtype_of
from mlx_empire.model.traced_products import Product

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

    Units are numbered as in the specification, layers from 1. `chunk`: tokens of the loss at a time. `model`: what is
    called.
    """

    def __init__(
        self, spec: ModelSpec, rows: int, width: int, chunk: int, kernels: Kernels | None = None
    ) -> None:
        self.model = TracedModel(spec, rows, width, kernels)
        self._spec, self._hidden = spec, self.model.hidden
        self._blocks, self._experts, self._products = (
            self.model.blocks,
            self.model.experts,
            self.model.products,
        )
        self._chunk, self._positions = chunk, max(chunk // rows, 1)
        head, _ = root_parts(spec)
        self._heads = [t for kind in ("trainable", "small") for t in head if t.kind == kind]

    def forward(self, unit: int) -> Pass:
        """A layer's forward; the hidden state stays with the caller."""
        return Pass(self.model.forward([unit]))

    def products(self, unit: int) -> list[Product]:
        """What a layer's run computes that could be kept, and whether its vjp computes it again."""
        return self._products.told(self.backward(unit, adds="", kept=None).graph)

    def backward(self, unit: int, *, adds: Adds, flat: bool = False, kept: Sequence[int] | None = ()) -> Pass:
        """A layer's vjp; `flat`: its gradients in the wire's dtype and flat, too, as the exchange takes them; `kept`:
        products whose results are there (None: all), as its last sources."""
        self._products.wanted = kept

        def body(hidden: mx.array, cotangent: mx.array, *sums: mx.array) -> list[mx.array]:
            def run(*arrays: mx.array) -> list[mx.array]:
                self.model.begin(arrays[len(trained) + 1 :])
                self.model.bind(trained, arrays)
                return [self.model.call(unit, arrays[len(trained)]), *self._blocks.came_in()]

            trained, taps = self._primals([unit])
            primals = [*(self.model.bound[t.name] for t in trained), hidden, *taps]
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
        return self._of_chunks(self.model.graph([0], [], [two, *self._batch(two)], body), two.shape[1])

    def tail(self, units: Sequence[int], *, adds: Adds) -> Pass:
        """The loss and the vjp of layers that are not recomputed, in order. The chunks of the loss are evaluated first,
        with the first of them the layers' forward; what the head's gradients are added to, with the backward."""

        two = min(2 * self._positions, self._hidden.shape[1])  # of the chunks that follow nothing is new

        def body(hidden: mx.array, *rest: mx.array) -> list[mx.array]:
            batch, roots, sums = rest[:3], rest[3 : 3 + len(root_sums)], rest[3 + len(root_sums) :]

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
            last = chunks[len(chunks) - 1 - len(self._heads) : -1]
            heads = [a.astype(mx.float32) + g.astype(mx.float32) for a, g in zip(roots, last, strict=False)]
            return [*chunks, found[len(trained)], *heads, *self._added(sums, units, trained, found)]

        own = adds == "own" and two <= self._positions  # chunks are added in fp32
        root_sums = [mx.zeros(t.shape, dtype_of(t) if own else mx.float32) for t in self._heads if adds]
        besides = [*self._batch(self._hidden), *root_sums]
        traced = self._differentiated(units, body, adds=adds, besides=besides, head=True)
        chunks = self._of_chunks(traced.graph, two)
        heads = traced.graph.outputs[sum(chunks.before) + 1 :][: len(root_sums)]
        return replace(chunks, gradients=(*chunks.gradients, *heads, *traced.gradients))

    # ---- head

    def _chunks(self, hidden: mx.array, batch: Arrays) -> Iterator[list[mx.array]]:
        """By chunk the losses so far, the head's gradients so far and that by the chunk of `hidden`."""
        heads = [self.model.bound[t.name] for t in self._heads]
        inputs, targets, mask = batch
        given = hidden, (inputs, targets, mask), mx.array(1.0), self._chunk
        for loss, sums, part in head_chunks(self._logits, heads, *given):
            yield [loss, *sums, part]

    def _logits(self, arrays: Arrays, hidden: mx.array, tokens: mx.array) -> mx.array:
        self.model.bind(self._heads, arrays)
        return self.model.head(hidden, tokens)

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
        sums = [mx.zeros(t.shape, dtype_of(t) if adds == "own" else mx.float32) for t in trained]
        free = [self._hidden, *besides, *(sums if adds else ())]
        bound = [*units, 0] if head else units
        with self._blocks.differentiated(self.model.calls_in_blocks(units)):
            graph = self.model.with_experts(
                units, lambda: self._blocks.put_together(self.model.graph(bound, free, [], body))
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


def _wire(tensor: TensorSpec) -> mx.Dtype:
    """The dtype in which a tensor's gradient is exchanged."""
    return mx.float32 if tensor.kind == "small" else dtype_of(tensor)


def _is_copied(gradient: mx.array, wire: mx.Dtype) -> bool:
    """Whether a gradient is another array once it is flat and in the wire's dtype."""
    return gradient.ndim != 1 or gradient.dtype != wire
