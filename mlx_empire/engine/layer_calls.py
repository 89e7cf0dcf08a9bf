"""How a layer is called for a micro-batch: with its mask or pattern, documents and noise, traced where it may be.

What is differentiated and kept around such a call is the pass's business (`passes`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from mlx_empire.data.batches import Teacher
from mlx_empire.engine.store import ShardStore
from mlx_empire.engine.traces import Arrays, LayerPass, Traces
from mlx_empire.errors import UserError
from mlx_empire.model.attention.by_pattern import ByPattern
from mlx_empire.model.attention.patterns import Cuts
from mlx_empire.model.attention.segments import Kernels
from mlx_empire.model.kept import Calls, Kept, calling
from mlx_empire.model.layers import LayerArguments, LayerNoise, SlottedModel, hidden_of, separate
from mlx_empire.model.ternary import strength_of

Call = Callable[[mx.array, Calls | None], mx.array]  # a layer's, of the hidden state
PassBody = Callable[[Call, Arrays, Arrays], tuple[list[mx.array], Any]]


@dataclass
class Running:
    """A micro-batch on its way. `position` counts this rank's micro-batches of the step.

    `batch`: inputs, targets and mask, each (rows, width); `hidden`: the current hidden state or cotangent
    (rows, width, hidden); `inputs`: by layer what its backward needs, and `kept`: what it need not compute again;
    `loss`: (rows,), in the end, or (rows, 2) with a `teacher`, which gives its values when the loss wants them.
    `documents` of packed rows: (rows, width), and `cuts`: where they begin.
    """

    position: int
    batch: tuple[mx.array, mx.array, mx.array]
    arguments: list[LayerArguments]
    documents: mx.array | None
    cuts: Cuts
    hidden: mx.array
    inputs: dict[int, mx.array] = field(default_factory=dict)
    kept: dict[int, Kept] = field(default_factory=dict)
    loss: mx.array | None = None
    teacher: Teacher | None = None

    @property
    def learnt(self) -> list[mx.array]:
        """What the differentiated loss takes of the micro-batch."""
        return [*self.batch, *map(mx.array, self.teacher() if self.teacher is not None else ())]


def differentiated(run: Callable[[mx.array], mx.array], x: mx.array, *, in_full: bool) -> mx.array:
    """`run(x)` by the kernels that MLX takes where it is differentiated: the first half of a vjp, and no second one.

    On Metal attention has kernels of its own there; so a layer's result has the bits that it has when the backward
    computes it again. `in_full`: compiled functions too run operation by operation, as they do in the backward. A GPU's
    kernels for that are others; a CPU's give the same bits.
    """
    (output,), _ = mx.vjp(lambda traced: mx.stop_gradient(run(traced if in_full else x)), [x], [])
    return output


class LayerCalls:
    """Calls layers, counted from 0, whose units are bound. Without `kernels` every layer attends by the mask that it is
    given; `noise` is there where layers have dropout; layers are traced where one `compiles`. `strength` is there where
    weights are trained as ternary ones, and is given to a trace: it changes from step to step."""

    def __init__(
        self,
        slotted: SlottedModel,
        store: ShardStore,
        noise: LayerNoise | None,
        kernels: Kernels | None,
        *,
        compiles: bool,
    ) -> None:
        self._slotted, self._noise = slotted, noise
        self.by_pattern = ByPattern(slotted.layers, kernels)
        self.strength = strength_of(slotted.layers)
        self.traces = Traces(slotted.layers, store, compiles=compiles)

    def run(
        self, layer: int, r: Running, what: tuple[Hashable, ...], body: PassBody, arrays: Arrays
    ) -> tuple[list[mx.array], Any]:
        """What `body` gives of the layer's call for the micro-batch, of its trained tensors and of `arrays`, lazily.

        `what`: all else that the body depends on.
        """
        documents = self._documents(layer, r)
        seeded = self._seed(layer, r)
        count, masked, strength = len(arrays), documents is not None, self.strength

        def whole(weights: Arrays, arrays: Arrays, given: LayerArguments) -> tuple[list[mx.array], Any]:
            documents = arrays[count] if masked else None
            if strength is not None:
                with strength.given(arrays[-1]):
                    return called(weights, arrays, given, documents)
            return called(weights, arrays, given, documents)

        def called(
            weights: Arrays, arrays: Arrays, given: LayerArguments, documents: mx.array | None
        ) -> tuple[list[mx.array], Any]:

            def call(hidden: mx.array, calls: Calls | None) -> mx.array:
                return self._call(layer, hidden, given, documents, calls)

            return body(call, weights, arrays[:count])

        arrays = [*arrays, *(() if documents is None else (documents,))]
        arrays += [] if strength is None else [strength.value]
        return self.traces.run(
            LayerPass(layer, (*what, masked), whole, arrays, self._given(layer, r), seeded)
        )

    def untraced(self, layer: int, r: Running, hidden: mx.array) -> mx.array:
        """The layer's result, as a part of a larger graph."""
        self._seed(layer, r)
        return self._call(layer, hidden, self._given(layer, r), self._documents(layer, r), None)

    def _seed(self, layer: int, r: Running) -> bool:
        """Whether the layer has noise, for which MLX's generator is seeded now."""
        if self._noise is None or not self._slotted.layers[layer].training:
            return False
        self._noise.seed(r.position, layer)
        return True

    def _given(self, index: int, r: Running) -> LayerArguments:
        """What a layer is given for the micro-batch, where documents are kept apart by its pattern with that."""
        given = r.arguments[index]
        return given if given.pattern is None else replace(given, pattern=given.pattern.packed(r.cuts))

    def _documents(self, index: int, r: Running) -> mx.array | None:
        """The documents of the micro-batch, where a layer's mask has to keep them apart."""
        return r.documents if r.arguments[index].pattern is None else None

    def _call(
        self,
        index: int,
        hidden: mx.array,
        given: LayerArguments,
        documents: mx.array | None,
        calls: Calls | None,
    ) -> mx.array:
        layer = self._slotted.layers[index]
        if documents is not None:
            given = separate(layer, given, documents)
        if calls is None:
            output = hidden_of(self.by_pattern.call(layer, hidden, given))
        else:
            with calling(calls.product):
                output = hidden_of(self.by_pattern.call(layer, hidden, given, calls.attention))
        if not isinstance(output, mx.array):
            raise UserError(
                f"{self._slotted.name}: layer {index} returns {type(output).__name__}, not one array; "
                "this architecture cannot be streamed"
            )
        return output
