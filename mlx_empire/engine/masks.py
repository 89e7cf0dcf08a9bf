"""Keeping packed documents apart: the mask a layer was given, combined with the documents' ids.

A layer's mask is `"causal"`, a boolean array (True: may attend), an additive array or None, for (.., width, width).
A token may attend to tokens of its own document only; sliding and chunked masks are kept. Layers without a `mask`
parameter, and models whose positions are absolute, cannot be packed: they are refused before training.
"""

from __future__ import annotations

import inspect
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_empire.engine.slots import LayerArguments


def mask_position(layer: nn.Module) -> int | None:
    """The index of `mask` among a layer's arguments after the hidden state; None if it takes none."""
    names = list(inspect.signature(type(layer).__call__).parameters)[2:]
    return names.index("mask") if "mask" in names else None


def given_mask(layer: nn.Module, arguments: LayerArguments) -> Any:
    """The mask that the model gave a layer; None if it gave none or the layer takes none."""
    position = mask_position(layer)
    if position is not None and position < len(arguments.positional):
        return arguments.positional[position]
    return arguments.keywords.get("mask")


def separable(layer: nn.Module, arguments: LayerArguments, width: int) -> bool:
    """Whether a layer's mask is one over pairs of positions, so that documents can be kept apart by it."""
    mask = given_mask(layer, arguments)
    if (
        mask_position(layer) is None or mask is None
    ):  # a state-space layer takes a mask of another kind, or none
        return False
    return isinstance(mask, str) or tuple(mask.shape[-2:]) == (width, width)


def same_document(documents: mx.array) -> mx.array:
    """(rows, width) document ids -> (rows, 1, width, width) booleans: query and key are of one document."""
    return documents[:, None, :, None] == documents[:, None, None, :]


def combine(mask: Any, same: mx.array) -> mx.array:
    """Restrict `mask` to pairs of one document; `same` is (rows, 1, width, width)."""
    if mask is None or isinstance(mask, str):
        width = same.shape[-1]
        positions = mx.arange(width)
        mask = positions[:, None] >= positions[None]
    if mask.dtype == mx.bool_:
        return mx.logical_and(mask, same)
    return mx.where(same, mask, mx.array(-mx.inf, mask.dtype))


def separate(layer: nn.Module, given: LayerArguments, documents: mx.array) -> LayerArguments:
    """A layer's arguments with the mask combined with `documents` (rows, width).

    Made anew for each call of a layer: a mask of width x width booleans is cheap to compute and dear to keep.
    """
    position = mask_position(layer)
    assert position is not None, "checked before training"
    mask = combine(given_mask(layer, given), same_document(documents))
    if position < len(given.positional):
        positional = (*given.positional[:position], mask, *given.positional[position + 1 :])
        return LayerArguments(positional, given.keywords)
    return LayerArguments(given.positional, {**given.keywords, "mask": mask})
