"""Decides the rules that keep a first moment alone: Lion, and SGD with momentum.

With g = clip_scale * gradient:

    Lion (Chen et al., 2023, algorithm 2)        w = w - lr (sign(beta1 m + (1 - beta1) g) + weight_decay w)
                                                 m = beta2 m + (1 - beta2) g
    SGD  (Polyak's momentum, decoupled decay)    m = beta1 m + g
                                                 w = w - lr (m + weight_decay w)

Lion's paper takes betas (0.9, 0.99) and a rate 3 to 10 times below AdamW's. SGD reads beta1 alone; 0 is plain SGD.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import mlx.core as mx

from mlx_empire.optim import codec
from mlx_empire.optim.compile import fused
from mlx_empire.optim.flat import FlatOptimizer
from mlx_empire.optim.master import completing
from mlx_empire.optim.protocol import State, StateCost, StepScalars

Rule = Callable[..., tuple[mx.array, mx.array]]

# Bytes per element that an update by SGD needs less than one by Lion, by whether its moment is in 8 bits.
_LESS: dict[bool, dict[str, int]] = {
    False: {"float32": 4},
    True: {"float32": 8, "exact": 4, "fp32": 4, "none": 4},
}


def _both(rule: Rule) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The fused rule on a float32 moment, and on a moment's codes and their unit."""

    def from_codes(
        w: mx.array, codes: mx.array, unit: mx.array, *rest: mx.array
    ) -> tuple[mx.array, mx.array]:
        return rule(w, codec.first_value(codes, unit), *rest)

    return fused(rule), fused(from_codes)


class MomentumOptimizer(FlatOptimizer):
    """A rule `(w, m, gradient, *numbers) -> (w, m)` as a `ShardOptimizer`."""

    moments = ("m",)
    _kernels: ClassVar[tuple[Callable[..., Any], Callable[..., Any]]]

    def _advance(
        self,
        w: mx.array,
        state: State,
        gradient: mx.array,
        numbers: tuple[mx.array, ...],
        keys: mx.array | None,
    ) -> tuple[mx.array, State]:
        plain, from_codes = self._kernels
        if "m_codes" not in state:
            w, m = plain(w, state["m"], gradient, *numbers)
            return w, {"m": m}
        assert keys is not None
        w, m = from_codes(w, state["m_codes"], codec.first_unit(state), gradient, *numbers)
        return w, codec.encode_lone_first(m, keys)


def _lion(
    w: mx.array,
    m: mx.array,
    gradient: mx.array,
    beta1: mx.array,
    rest1: mx.array,
    beta2: mx.array,
    rest2: mx.array,
    clip: mx.array,
    rate: mx.array,
    decay: mx.array,
) -> tuple[mx.array, mx.array]:
    g = gradient.astype(mx.float32) * clip
    direction = beta1 * m + rest1 * g
    return w - (rate * mx.sign(direction) + decay * w), beta2 * m + rest2 * g


def _sgd(
    w: mx.array,
    m: mx.array,
    gradient: mx.array,
    beta1: mx.array,
    clip: mx.array,
    rate: mx.array,
    decay: mx.array,
) -> tuple[mx.array, mx.array]:
    m = beta1 * m + gradient.astype(mx.float32) * clip
    return w - (rate * m + decay * w), m


class Lion(MomentumOptimizer):
    """Lion as a `ShardOptimizer`; see `FlatOptimizer` for `state_bits` and `master_weights`."""

    _kernels = _both(_lion)

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        state_bits: int = 32,
        master_weights: str = "exact",
    ) -> None:
        super().__init__(weight_decay, state_bits, master_weights)
        self.betas = betas

    def numbers(self, scalars: StepScalars, decay: bool) -> tuple[float, ...]:
        """Betas and 1 - betas, clip scale, lr, lr weight_decay."""
        (beta1, beta2), lr = self.betas, scalars.learning_rate
        decayed = lr * self.weight_decay if decay else 0.0
        return (beta1, 1 - beta1, beta2, 1 - beta2, scalars.clip_scale, lr, decayed)

    def largest_update(self, state: State, step: int) -> mx.array:
        """1, or 0 where there was no gradient yet: a sign has no size."""
        m = codec.decode_first(state) if "m_codes" in state else state["m"]
        return mx.any(m != 0).astype(mx.float32)


class Sgd(MomentumOptimizer):
    """SGD with momentum as a `ShardOptimizer`; see `FlatOptimizer` for the rest."""

    _kernels = _both(_sgd)

    def __init__(
        self,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        state_bits: int = 32,
        master_weights: str = "exact",
    ) -> None:
        super().__init__(weight_decay, state_bits, master_weights)
        self.momentum = momentum

    def numbers(self, scalars: StepScalars, decay: bool) -> tuple[float, ...]:
        """Momentum, clip scale, lr, lr weight_decay."""
        lr = scalars.learning_rate
        return (self.momentum, scalars.clip_scale, lr, lr * self.weight_decay if decay else 0.0)

    def state_bytes(self, elements: int, weight_dtype: str, *, quantised: bool) -> StateCost:
        """Less than Lion's: weights move by the new moment itself, and nothing lies beside that and them."""
        cost = super().state_bytes(elements, weight_dtype, quantised=quantised)
        master = completing(weight_dtype, self.master_weights)
        less = _LESS["m_codes" in cost].get(master, 0)
        cost.alone, cost.together = cost.alone - less, cost.together - less
        cost.in_place = 0.0 if master == "float32" else cost.in_place
        return cost

    def largest_update(self, state: State, step: int) -> mx.array:
        """max |m|."""
        return mx.max(mx.abs(codec.decode_first(state) if "m_codes" in state else state["m"]))
