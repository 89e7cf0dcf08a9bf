"""Can this model be streamed, and how does it use its root? Asked of the real model before training; no layer is
evaluated.

A layer may depend on the rest of the model by its hidden state alone. So what the model passes to its layers besides
(masks) must not change when the slots return something else, nor when the tokens change: otherwise layers share more
than the hidden state (shared keys and values, per-layer inputs), gradients would get lost, and the model is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_empire.engine.masks import separable
from mlx_empire.engine.slots import LayerArguments, SlottedModel, refuse_sharing
from mlx_empire.engine.store import ShardStore
from mlx_empire.errors import UserError

WIDTH = 8


@dataclass(frozen=True)
class RootUse:
    """Positions among the root's trainable tensors that head and embedding depend on, and what packing needs."""

    head: tuple[int, ...]
    embed: tuple[int, ...]
    absolute_positions: bool
    separable: bool


def probe_root(slotted: SlottedModel, store: ShardStore, vocabulary: int) -> RootUse:
    """Check that layers are tied by the hidden state alone (UserError if not) and find out how the root is used.

    A tensor's use is found by binding NaN in its place and looking whether NaN comes out.
    """
    root = store.bind(0)
    tokens = (mx.arange(WIDTH) % vocabulary)[None]
    hidden, arguments = slotted.capture(tokens)
    noise = [0.5 * (i + 1) for i in range(len(slotted.layers))]
    _, disturbed = slotted.capture(tokens, noise)
    _, others = slotted.capture((tokens * 7 + 3) % vocabulary)
    if not (_same(arguments, disturbed) and _same(arguments, others)):
        raise refuse_sharing(slotted.name)
    boundary = mx.random.normal(hidden.shape, key=mx.random.key(0)).astype(hidden.dtype)
    head, embed = [], []
    for i, tensor in enumerate(root):
        poisoned = list(root)
        poisoned[i] = mx.broadcast_to(mx.array(mx.nan, tensor.dtype), tensor.shape)
        store.rebind(0, poisoned)
        if _has_nan(slotted.head(tokens, boundary)):
            head.append(i)
        if _has_nan(slotted.embed(tokens)):
            embed.append(i)
    store.rebind(0, root)
    repeated = slotted.embed(mx.zeros((1, WIDTH), mx.int32))
    absolute = not bool(mx.array_equal(repeated[:, 0], repeated[:, -1]).item())
    store.free(0)
    apart = all(
        separable(layer, given, WIDTH) for layer, given in zip(slotted.layers, arguments, strict=True)
    )
    return RootUse(tuple(head), tuple(embed), absolute, apart)


def check_packing(slotted: SlottedModel, use: RootUse) -> None:
    """UserError where packed documents could not be kept apart."""
    if use.absolute_positions:
        raise UserError(f"data.packing: true: {slotted.name} has absolute positions; set data.packing: false")
    if not use.separable:
        raise UserError(
            f"data.packing: true: {slotted.name} has layers without a mask; set data.packing: false"
        )


def _same(first: Iterable[LayerArguments], second: Iterable[LayerArguments]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(_equal((a.positional, a.keywords), (b.positional, b.keywords)) for a, b in pairs)


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, mx.array) or isinstance(second, mx.array):
        both = isinstance(first, mx.array) and isinstance(second, mx.array)
        return (
            both
            and first.shape == second.shape
            and bool(mx.array_equal(first, second, equal_nan=True).item())
        )
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(_equal(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, dict):
        a, b = dict(tree_flatten(first)), dict(tree_flatten(second))
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return bool(first is second or first == second)


def _has_nan(array: mx.array) -> bool:
    return bool(mx.any(mx.isnan(array)).item())
