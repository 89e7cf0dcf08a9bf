"""Adapters of several daughters on one base, in one model: a layer runs once for all of them.

A micro-batch holds the rows of every daughter, one after the other and equally many each. What all share (the base's
products, norms, attention) does not mix rows; each adapter's module adds to the rows of a daughter what its own
matrices make of them. So every daughter's loss and gradients are what they would be alone, and the base lies in memory
once and is gathered once a layer.

- LoRA on linear modules: products batched over the daughters (as mLoRA does, arXiv:2312.02515).
- DoRA: the same, and each one's own norm of the adapted rows; the base's matrix is dequantised once for all.
- Embedding and head: each one's own tables for its rows, by the operations of mlx-lm's layer.
- Stacked experts: the module that holds them sorts tokens by expert, and rows lose their order. So it is called by
  itself for each daughter's tokens: its sort and its sums are those of a daughter alone.
- Dropout: each one's own masks, of the shape and from the state of MLX's generator that it has alone.

Experts that stand in another module than mlx-lm's `SwitchGLU` and `SwitchMLP` cannot be put together: nobody knows what
that does with the rows. A model with such holds one daughter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear


@dataclass
class Present:
    """The places of the daughters whose rows a micro-batch holds, in order; shared by all modules of a model.

    states: by place the state of MLX's generator from which a daughter's dropout draws; empty where nothing is drawn.
    """

    places: list[int] = field(default_factory=list)
    states: dict[int, mx.array] = field(default_factory=dict)

    def are(self, places: Sequence[int]) -> None:
        """Those in these places are present from now on; nothing is drawn for them unless they are seeded."""
        self.places = list(places)
        self.states.clear()

    def key(self, place: int) -> mx.array | None:
        """By what the daughter in `place` draws next, as MLX's generator goes on from that state; None, for MLX's own,
        where none is seeded (a call whose result nobody wants)."""
        if place not in self.states:
            return None
        self.states[place], key = mx.random.split(self.states[place])
        return key

    @contextmanager
    def only(self, place: int) -> Iterator[None]:
        """Within, what is called has the rows of one of them."""
        before, self.places = self.places, [place]
        try:
            yield
        finally:
            self.places = before


class _Together(nn.Module):
    """An adapter's module for `count` daughters. Each has `names` of its own, as `daughters.N.NAME`; what is frozen
    stays where mlx-lm has it, in the base's module `inner`."""

    names: tuple[str, ...] = ("lora_a", "lora_b")
    inner = "linear"

    def __init__(self, alone: nn.Module, count: int, present: Present) -> None:
        super().__init__()
        self[self.inner] = alone[self.inner]
        self.dropout = alone.dropout
        self.scale: float = alone.scale
        self.daughters = [{name: alone[name] for name in self.names} for _ in range(count)]
        self._present = present

    def own(self, *names: str) -> list[list[mx.array]]:
        """By name the tensors of the daughters present, in order."""
        return [[self.daughters[place][name] for place in self._present.places] for name in names]

    def by_daughter(
        self, x: mx.array, call: Callable[..., mx.array], *tensors: Sequence[mx.array]
    ) -> mx.array:
        """`call(rows, *tensors)` of each daughter's rows of `x` (rows, ...) and its own tensors, put together again."""
        parts = mx.split(x, len(self._present.places))
        return _joined([call(part, *own) for part, *own in zip(parts, *tensors, strict=True)])

    def dropped(self, x: mx.array) -> mx.array:
        """`nn.Dropout` of each daughter's rows of `x` (rows, ...), by masks from its own state."""
        present, keep = self._present, self.dropout._p_1
        if keep == 1 or not self.dropout.training:
            return x
        own = (x.shape[0] // len(present.places), *x.shape[1:])
        mask = _joined([mx.random.bernoulli(keep, own, present.key(place)) for place in present.places])
        rows: mx.array = (mask * x) * (1 / keep)
        return rows

    def low_rank(self, x: mx.array, outputs: tuple[int, ...]) -> mx.array:
        """scale x dropout(x) a b of each row's daughter, in float32 (*outputs)."""
        a, b = (mx.stack(one) for one in self.own("lora_a", "lora_b"))
        z = (self.dropped(x).reshape(a.shape[0], -1, x.shape[-1]) @ a) @ b
        scaled: mx.array = (self.scale * z).reshape(outputs)
        return scaled


class LoRATogether(_Together):
    """mlx-lm's `LoRALinear` for several daughters."""

    def __call__(self, x: mx.array) -> mx.array:
        """(rows, width, inputs) -> (rows, width, outputs); rows belong to the daughters present, in order."""
        y: mx.array = self.linear(x)
        return y + self.low_rank(x, y.shape).astype(x.dtype)


class DoRATogether(_Together):
    """mlx-lm's `DoRALinear` for several daughters."""

    names = ("lora_a", "lora_b", "m")
    _is_quantized, _dequantized_weight = DoRALinear._is_quantized, DoRALinear._dequantized_weight

    def __call__(self, x: mx.array) -> mx.array:
        """(rows, width, inputs) -> (rows, width, outputs); rows belong to the daughters present, in order."""
        w = self._dequantized_weight()
        y: mx.array = x @ w.T
        out = y + self.low_rank(x, y.shape).astype(x.dtype)
        factors = [m / self._norms(w, a, b) for a, b, m in zip(*self.own(*self.names), strict=True)]
        by_daughter = out.reshape(len(factors), -1, out.shape[-1])
        out = (mx.stack(factors)[:, None].astype(x.dtype) * by_daughter).reshape(out.shape)
        return out + self.linear.bias if "bias" in self.linear else out

    def _norms(self, w: mx.array, a: mx.array, b: mx.array) -> mx.array:
        """(outputs,): the norm of each row of a daughter's adapted matrix, a constant for the gradient."""
        adapted = w + (self.scale * b.T) @ a.T
        return mx.stop_gradient(mx.linalg.norm(adapted, axis=1))


class EmbeddingTogether(_Together):
    """mlx-lm's `LoRAEmbedding` for several daughters."""

    inner = "embedding"

    def __call__(self, x: mx.array) -> mx.array:
        """Tokens (rows, width) -> (rows, width, features); rows belong to the daughters present, in order."""
        y: mx.array = self.embedding(x)
        z = self.dropped(self.by_daughter(x, lambda own, a, b: a[own] @ b, *self.own("lora_a", "lora_b")))
        out: mx.array = y + (self.scale * z).astype(y.dtype)
        return out

    def as_linear(self, x: mx.array) -> mx.array:
        """Hidden states (rows, width, features) -> logits, where the head is the same matrix."""
        y: mx.array = self.embedding.as_linear(x)
        tensors = self.own("lora_a", "lora_b")
        z = self.by_daughter(self.dropped(x), lambda own, a, b: (own @ b.T) @ a.T, *tensors)
        return y + (self.scale * z).astype(x.dtype)


class SwitchTogether(_Together):
    """mlx-lm's `LoRASwitchLinear`, called with the tokens of one daughter at a time."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """As `LoRASwitchLinear`: tokens by their experts."""
        y: mx.array = self.linear(x, indices, sorted_indices=sorted_indices)
        (a,), (b,) = self.own("lora_a", "lora_b")
        z = self.dropped(x)
        for matrices in (a, b):
            z = mx.gather_mm(z, matrices.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices)
        return y + (self.scale * z).astype(x.dtype)


_KINDS: dict[type[nn.Module], type[_Together]] = {
    LoRALinear: LoRATogether,
    DoRALinear: DoRATogether,
    LoRAEmbedding: EmbeddingTogether,
    LoRASwitchLinear: SwitchTogether,
}
_HOLDERS: tuple[type[nn.Module], ...] = (SwitchGLU, SwitchMLP)


@cache
def _one_by_one(holder: type[nn.Module]) -> type[nn.Module]:
    """The class of modules like `holder` that run the tokens of one daughter after those of another."""

    def call(self: nn.Module, x: mx.array, indices: mx.array) -> mx.array:
        """(..., features), (..., experts of a token) -> (..., experts of a token, features)."""
        present: Present = self._present
        count = len(present.places)
        if count == 1:
            alone: mx.array = holder.__call__(self, x, indices)
            return alone
        tokens = mx.split(x.reshape(-1, x.shape[-1]), count)
        chosen = mx.split(indices.reshape(-1, indices.shape[-1]), count)
        parts = []
        for place, own, experts in zip(present.places, tokens, chosen, strict=True):
            with present.only(place):
                parts.append(holder.__call__(self, own, experts))
        out = _joined(parts)
        return out.reshape(*indices.shape, out.shape[-1])

    return type(holder.__name__, (holder,), {"__call__": call, "__module__": holder.__module__})


def why_alone(model: nn.Module) -> str | None:
    """Why daughters cannot be put together in a model with adapters, as the end of a sentence; None: they can."""
    for path, owner, key, _ in _adapters(model):
        if isinstance(owner[key], LoRASwitchLinear) and not isinstance(owner, _HOLDERS):
            return f"{path} are stacked experts that {type(owner).__name__} calls in a way of its own"
    return None


def put_together(model: nn.Module, count: int) -> Present:
    """Replace every adapter's module of a lazily built model for `count` daughters, of which all are present; the
    caller says later which are. What `why_alone` names is left as it is, for one daughter."""
    present = Present(list(range(count)))
    if why_alone(model) is not None:
        assert count == 1
        return present
    for _, owner, key, kind in list(_adapters(model)):
        owner[key] = kind(owner[key], count, present)
        if kind is SwitchTogether and "_present" not in vars(owner):
            owner.__class__, owner._present = _one_by_one(owner.__class__), present
    return present


def _adapters(model: nn.Module) -> Iterator[tuple[str, Any, Any, type[_Together]]]:
    """Every adapter's module: its path, what holds it and by which key, and its class for several daughters."""
    for path, module in model.named_modules():
        kind = _KINDS.get(type(module))
        if kind is None:
            continue
        *above, last = path.split(".")
        owner: Any = model
        for part in above:
            owner = owner[int(part)] if isinstance(owner, list) else owner[part]
        yield path, owner, int(last) if isinstance(owner, list) else last, kind


def _joined(parts: Sequence[mx.array]) -> mx.array:
    """Rows of several daughters, one after the other."""
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts))
