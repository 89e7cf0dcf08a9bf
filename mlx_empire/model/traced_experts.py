"""What stands for the gradient of stacked experts while a layer's graph is traced.

`mx.export_function` has no word for one primitive, the gradient of stacked experts by sorted tokens (SegmentedMM). A
product of the same inputs and output stands in: the experts' products get a summand, whose cotangent is theirs, and
the summand is taken out of the graph again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRASwitchLinear

from mlx_empire.model.attention.traced import without_summands
from mlx_empire.model.graph import Graph
from mlx_empire.model.spec import TensorSpec
from mlx_empire.model.together import SwitchTogether


def stacked_tensors(layer: nn.Module) -> Iterator[str]:
    """The names of a layer's stacked experts and of their adapters."""
    for path, module in layer.named_modules():
        if isinstance(module, SwitchLinear):
            yield f"{path}.weight"
        elif isinstance(module, LoRASwitchLinear):
            yield from (f"{path}.lora_a", f"{path}.lora_b")
        elif isinstance(module, SwitchTogether):
            places = range(len(module.daughters))
            yield from (f"{path}.daughters.{n}.{name}" for n in places for name in module.names)


@dataclass
class TracedExperts:
    """What stands in for SegmentedMM: the experts' sorted products of a pass, each with a summand."""

    stand_in: bool = False
    shapes: Sequence[tuple[int, ...]] = ()
    # Tokens, matrices, indices.
    calls: list[tuple[mx.array, mx.array, mx.array]] = field(default_factory=list)
    given: list[mx.array] = field(default_factory=list)
    seen: list[tuple[int, ...]] = field(default_factory=list)  # the shapes of the last call's products

    @contextmanager
    def standing_in(self, shapes: Sequence[tuple[int, ...]]) -> Iterator[None]:
        """Within, the layers' sorted products, which have these `shapes`, get summands."""
        self.stand_in, self.shapes = True, shapes
        try:
            with self.watching():
                yield
        finally:
            self.stand_in, self.shapes = False, ()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, the layers' sorted products are noted."""
        original = mx.gather_mm

        def gather_mm(a: mx.array, b: mx.array, *rest: Any, **keywords: Any) -> mx.array:
            y = original(a, b, *rest, **keywords)
            if not keywords.get("sorted_indices"):
                return y
            place = len(self.calls)
            self.calls.append((a, b, keywords["rhs_indices"]))
            self.seen.append(tuple(y.shape))
            return y + self.given[place] if place < len(self.given) else y

        mx.gather_mm = gather_mm
        try:
            yield
        finally:
            mx.gather_mm = original
            self.calls, self.given, self.seen = [], [], []

    def placeholders(self) -> list[mx.array]:
        """Arrays without data for the summands."""
        return [mx.zeros(shape) for shape in self.shapes]

    def begin(self, summands: Sequence[mx.array]) -> None:
        """A call of layers: its products get these."""
        self.given, self.calls, self.seen = list(summands), [], []

    def summands(self) -> list[mx.array]:
        """Those of the graph."""
        return list(self.given)

    def gradients(self, tensors: Sequence[TensorSpec], cotangents: Sequence[mx.array]) -> dict[str, mx.array]:
        """By name the gradient of each stacked tensor, as MLX makes it of the tokens and of the product's cotangent."""
        found: dict[str, mx.array] = {}
        for (x, matrices, indices), dy in zip(self.calls, cotangents, strict=True):
            total, inputs, outputs = matrices.shape
            own = next(
                (t for t in tensors if t.name not in found and t.shape == (total, outputs, inputs)), None
            )
            if own is not None:
                found[own.name] = _segmented(x, dy, indices, own.shape)
        return {t.name: mx.zeros(t.shape) for t in tensors} | found

    def taken_out(self, graph: Graph) -> Graph:
        """The graph without the summands, which are its last sources that were given."""
        return without_summands(graph, graph.given[len(graph.given) - len(self.shapes) :])


def _segmented(x: mx.array, dy: mx.array, indices: mx.array, shape: tuple[int, ...]) -> mx.array:
    """MLX's `gather_mm_grad` of sorted indices; a batched product stands for the segmented one."""
    segments = mx.zeros((shape[0],), mx.uint32).at[indices].add(mx.array(x.shape[-2], mx.uint32))
    segments = mx.concatenate([mx.array([0], mx.uint32), mx.cumsum(segments)])
    first = mx.as_strided(segments, (shape[0], 2), (1, 1), 0)[:, 0]
    cotangents = mx.swapaxes(dy.flatten(0, -2), 0, 1)
    product = mx.gather_mm(cotangents[None], x.flatten(0, -2)[None], lhs_indices=first, rhs_indices=first)
    gradient = product.reshape(shape)
    return mx.swapaxes(mx.swapaxes(gradient, -1, -2), -1, -2)
