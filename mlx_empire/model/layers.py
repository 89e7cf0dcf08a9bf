"""What stands in the model's list of layers while we train, what those layers are given, and what seeds them.

The model's code is never edited. Each layer is replaced by a `Slot` that forwards attribute reads to the layer and
hands calls to the `SlottedModel`, so that the model's own `__call__` can be run in parts. By mode a call does this:

- capture: no layer runs; the input of layer 0 and every layer's other arguments (masks) are noted. Only the first
           layer of each class is called once, lazily: whether it returns more than the hidden state shows in no other
           way. What it returns besides must not reach another layer;
- head:    every slot returns its input, the last one the boundary activation: final norm, head and softcaps run;
- embed:   slot 0 stops the call; what it was given is the embedding's output.

Masks keep packed documents apart. A layer's mask is `"causal"`, a boolean array (True: may attend), an additive array
or None, for (.., width, width). A token may attend to tokens of its own document only; sliding and chunked masks are
kept. Layers without a `mask` parameter, and models whose positions are absolute, cannot be packed: they are refused
before training.

Noise (dropout) is seeded by a hash of seed, step, micro-batch and layer, never of the rank. So a recomputed layer sees
the noise of its first run, and a result depends neither on the number of ranks nor on which layers are recomputed.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_empire.errors import UserError
from mlx_empire.model.attention.patterns import Pattern
from mlx_empire.model.build import find_layers


class _Stop(Exception):
    """Leaves the model's call once slot 0 has been reached."""


@dataclass(frozen=True)
class LayerArguments:
    """What the model passes to a layer besides the hidden state; `pattern`: what its mask "causal" stands for."""

    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    pattern: Pattern | None = None


class Besides:
    """Stands for what a layer returns besides the hidden state."""


def hidden_of(output: Any) -> Any:
    """The hidden state of what a layer returned: the first of a tuple, whose others are not used (see `Besides`)."""
    return output[0] if isinstance(output, tuple) and output else output


def refuse_sharing(name: str) -> UserError:
    """The error for layers that are tied by more than the hidden state."""
    return UserError(
        f"{name}: its layers share more than the hidden state (keys, values, residuals or per-layer inputs); "
        "streaming would lose gradients, so this architecture is refused"
    )


class Slot:
    """Takes a layer's place in the model's list; reads pass through, calls go to the slotted model."""

    def __init__(self, slotted: SlottedModel, index: int, layer: nn.Module) -> None:
        self._slotted, self._index, self._layer = slotted, index, layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # for `isinstance`: some models choose a layer's mask by its class
        return type(self._layer)

    def __contains__(self, key: str) -> bool:
        return key in self._layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args:  # the hidden state is the layer's first parameter, whatever its name
            _, first, *_ = inspect.signature(type(self._layer).__call__).parameters
            args = (kwargs.pop(first, None),)
        return self._slotted.visit(self._index, args[0], LayerArguments(args[1:], kwargs))


class SlottedModel:
    """The model with slots in place of its layers. `layers` are the real ones, in order."""

    def __init__(self, model: nn.Module, name: str) -> None:
        owner, key, _ = find_layers(model, name)
        self.model, self.name = model, name
        self.layers: list[nn.Module] = list(owner[key])
        self._slots = [Slot(self, i, layer) for i, layer in enumerate(self.layers)]
        self.put_slots()
        self._mode = "idle"
        self._noted: list[LayerArguments] = []
        self._hidden: mx.array | None = None
        # By class of layer what it returns after the hidden state; None where that is all.
        self._besides: dict[type, tuple[Besides | None, ...] | None] = {}
        self._noise: Sequence[float] | None = None

    def put_slots(self) -> None:
        """Put the slots into the model's list of layers, whatever is there."""
        owner, key, _ = find_layers(self.model, self.name)
        owner[key] = list(self._slots)

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The model as it was, layers in place of slots and without dropout; its weights must be bound."""
        owner, key, _ = find_layers(self.model, self.name)
        slots, owner[key] = owner[key], list(self.layers)
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.train()
            owner[key] = slots

    def visit(self, index: int, x: mx.array, arguments: LayerArguments) -> Any:
        """What a slot does when the model calls it; it returns as many things as the layer does."""
        last = index == len(self.layers) - 1
        if self._mode == "capture":
            self._note(index, x, arguments)
            return self._as_returned(index, x if self._noise is None else x + self._noise[index])
        if self._mode == "head":
            assert self._hidden is not None
            return self._as_returned(index, self._hidden if last else x)
        if self._mode == "embed":
            self._hidden = x
            raise _Stop
        raise AssertionError(f"slot {index} called in mode {self._mode!r}")

    def _note(self, index: int, x: mx.array, arguments: LayerArguments) -> None:
        if index != len(self._noted):
            raise UserError(f"{self.name}: layers are not visited once each, in order; it cannot be streamed")
        given = tree_flatten([x, arguments.positional, arguments.keywords])
        if any(isinstance(value, Besides) for _, value in given):
            raise refuse_sharing(self.name)
        if not isinstance(x, mx.array):
            raise UserError(
                f"{self.name}: layer {index} is given {type(x).__name__} in place of one hidden state; "
                "it cannot be streamed"
            )
        if index == 0:
            self._hidden = x
        self._noted.append(arguments)
        layer = self.layers[index]
        if type(layer) not in self._besides:
            output = layer(x, *arguments.positional, **arguments.keywords)  # a graph that is never evaluated
            if not isinstance(hidden_of(output), mx.array):
                raise UserError(
                    f"{self.name}: layer {index} returns {type(output).__name__}, not one hidden state; "
                    "it cannot be streamed"
                )
            others = output[1:] if isinstance(output, tuple) else None
            self._besides[type(layer)] = others and tuple(None if o is None else Besides() for o in others)

    def _as_returned(self, index: int, x: mx.array) -> Any:
        besides = self._besides.get(type(self.layers[index]))
        return x if besides is None else (x, *besides)

    def capture(
        self, tokens: mx.array, noise: Sequence[float] | None = None
    ) -> tuple[mx.array, list[LayerArguments]]:
        """The input of layer 0 and each layer's arguments for (rows, width) tokens. Nothing is evaluated.

        `noise`, one number per layer, is added to what each slot returns: arguments that change with it depend on
        more than the hidden state, and such a model must be refused.
        """
        self._noted, self._noise = [], noise
        self._run("capture", tokens)
        noted, self._noted, self._noise = self._noted, [], None
        if len(noted) != len(self.layers):
            raise UserError(
                f"{self.name}: only {len(noted)} of {len(self.layers)} layers are called; it cannot be streamed"
            )
        return self._take(), noted

    def head(self, tokens: mx.array, boundary: mx.array) -> mx.array:
        """Logits from the last layer's output; `tokens` only give the shape. Differentiable in the boundary."""
        self._hidden = boundary
        logits = self._run("head", tokens)
        self._hidden = None
        if not isinstance(logits, mx.array):
            raise UserError(
                f"{self.name}: its call returns {type(logits).__name__}, not logits; cannot be streamed"
            )
        return logits

    def embed(self, tokens: mx.array) -> mx.array:
        """The input of layer 0 for (rows, width) tokens. Differentiable in the root's tensors."""
        self._run("embed", tokens)
        return self._take()

    def train(self, mode: bool) -> None:
        """Let the layers train (with dropout, where they have it) or evaluate."""
        for layer in self.layers:
            layer.train(mode)

    def _run(self, mode: str, tokens: mx.array) -> Any:
        self._mode = mode
        try:
            return self.model(tokens)
        except _Stop:
            return None
        finally:
            self._mode = "idle"

    def _take(self) -> mx.array:
        hidden, self._hidden = self._hidden, None
        assert hidden is not None
        return hidden


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
    mask = combine(given_mask(layer, given), same_document(documents))
    return with_mask(layer, given, mask[:, :, None] if _scores_by_groups(layer) else mask)


def _scores_by_groups(layer: nn.Module) -> bool:
    """Whether a layer adds its mask to scores of (rows, groups, heads of a group, width, width).

    A mask of (rows, 1, width, width) is broadcast there as if its rows were groups of heads: where there are as many,
    without a word. MLX's own attention takes that mask as it is.
    """
    attention: Any = getattr(layer, "self_attn", None)
    match type(attention).__module__.removeprefix("mlx_lm.models."):
        case "gemma2":
            return bool(attention.repeats > 1)
        case "phi3small":
            return bool(attention.block_sparse)
    return False


def with_mask(layer: nn.Module, given: LayerArguments, mask: Any) -> LayerArguments:
    """A layer's arguments with another mask."""
    position = mask_position(layer)
    assert position is not None, "checked before"
    if position < len(given.positional):
        positional = (*given.positional[:position], mask, *given.positional[position + 1 :])
        return replace(given, positional=positional)
    return replace(given, keywords={**given.keywords, "mask": mask})


class LayerNoise:
    """Seeds MLX's generator before each call of a layer in training.

    Where the rows of several daughters pass together each has a generator of its own: its state lies in `states`, by
    its place, and MLX's stays as it is.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._at: list[dict[int, tuple[int, int]]] = []
        self.states: dict[int, mx.array] | None = None

    def begin(self, step: int, micro_batches: Sequence[int]) -> None:
        """A new step; `micro_batches`: this rank's, numbered over all ranks, in the order in which it runs them."""
        self._at = [{0: (step, micro)} for micro in micro_batches]

    def begin_together(self, at: Sequence[Mapping[int, tuple[int, int]]]) -> None:
        """A new step of several: for each micro-batch that runs, by place, whose step and micro-batch it is."""
        self._at = [dict(one) for one in at]

    def seed(self, position: int, layer: int) -> None:
        """Before `layer` runs the micro-batch at `position` among this rank's."""
        numbers = {place: self._number(*at, layer) for place, at in self._at[position].items()}
        if self.states is None:
            mx.random.seed(numbers[0])
        else:
            self.states.clear()
            self.states |= {place: mx.random.key(number) for place, number in numbers.items()}

    def _number(self, step: int, micro: int, layer: int) -> int:
        key = f"{self._seed}:{step}:{micro}:{layer}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
