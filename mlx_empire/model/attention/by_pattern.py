"""Which layers attend by pattern: those whose mask is recognised, and who hand it to MLX's attention as it is.

The others keep their arrays and MLX's path: layers with a softmax of their own (gemma2), with a mask that is added
(MLA), and those whose mask is no pattern. What a layer does with its mask is seen by calling it once, lazily.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_empire.model.attention.patterns import CAUSAL, Pattern, recognise
from mlx_empire.model.attention.segments import InBlocks, Kernels, attending, instead
from mlx_empire.model.layers import LayerArguments, given_mask, mask_position, with_mask


class ByPattern:
    """The patterns of a model's layers, found once for each shape of micro-batch; without `kernels` all keep masks.

    `told`: by layer the pattern, where it is known for rows of any width and no mask is to be looked at.
    """

    def __init__(
        self, layers: Sequence[nn.Module], kernels: Kernels | None, told: list[Pattern | None] | None = None
    ) -> None:
        self._layers, self._kernels, self._told = layers, kernels, told
        self._known: dict[tuple[int, ...], list[Pattern | None]] = {}

    def settled(self, hidden: mx.array, arguments: Sequence[LayerArguments]) -> list[LayerArguments]:
        """What layers are given, with patterns in the place of masks; as it is where rows are short.

        hidden (rows, width, hidden size): the input of the first layer. An array that is a mask is evaluated.
        """
        if self._kernels is None or hidden.shape[1] <= self._kernels.short:
            return list(arguments)
        return [
            given if pattern is None else replace(with_mask(layer, given, CAUSAL), pattern=pattern)
            for layer, given, pattern in zip(
                self._layers, arguments, self.patterns(hidden, arguments), strict=True
            )
        ]

    def patterns(self, hidden: mx.array, arguments: Sequence[LayerArguments]) -> list[Pattern | None]:
        """By layer the pattern; None where it keeps its mask."""
        if self._told is not None:
            return self._told
        shape = tuple(hidden.shape)
        if shape not in self._known:
            self._known[shape] = self._found(hidden, arguments)
        return self._known[shape]

    def call(
        self, layer: nn.Module, hidden: mx.array, given: LayerArguments, in_blocks: InBlocks | None = None
    ) -> Any:
        """What the layer returns; `in_blocks`: in the place of the kernels' own."""
        if self._kernels is None or given.pattern is None:
            return layer(hidden, *given.positional, **given.keywords)
        kernels = self._kernels if in_blocks is None else replace(self._kernels, in_blocks=in_blocks)
        with attending(given.pattern, kernels):
            return layer(hidden, *given.positional, **given.keywords)

    def _found(self, hidden: mx.array, arguments: Sequence[LayerArguments]) -> list[Pattern | None]:
        recognised: dict[int, Pattern | None] = {}  # by identity of a mask: many layers share one
        found = []
        for layer, given in zip(self._layers, arguments, strict=True):
            mask = given_mask(layer, given)
            if id(mask) not in recognised:
                recognised[id(mask)] = recognise(mask, hidden.shape[1])
            pattern = recognised[id(mask)]
            found.append(pattern if pattern is not None and _hands_over(layer, hidden, given) else None)
        return found


def _hands_over(layer: nn.Module, hidden: mx.array, given: LayerArguments) -> bool:
    """Whether the layer runs with "causal" for a mask, and every attention in it is MLX's, is told so, and is of all
    positions. A graph that is never evaluated.
    """
    if mask_position(layer) is None:
        return False
    width, whole = hidden.shape[1], []

    def noted(q: mx.array, k: mx.array, v: mx.array, *, mask: object = None, **more: Any) -> mx.array:
        told = isinstance(mask, str) and mask == CAUSAL
        whole.append(told and q.shape[2] == k.shape[2] == width)
        return attention(q, k, v, mask=CAUSAL, **more)

    with instead(noted) as attention:
        try:
            layer(hidden, *(given := with_mask(layer, given, CAUSAL)).positional, **given.keywords)
        except Exception:  # foreign code that wants an array: it keeps the one that it gets
            return False
    return bool(whole) and all(whole)
