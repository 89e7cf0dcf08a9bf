"""Decides AdamW's step on one chunk: the textbook's rule in float32.

    g = clip_scale * gradient
    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    w = w - (lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps) + lr weight_decay w)

Decoupled decay, bias correction, eps outside the root (Loshchilov and Hutter, 2019, algorithm 2). The decay
is subtracted together with the update: one rounding, and a factor 1 - lr weight_decay that float32 cannot
hold is not needed.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_empire.optim import codec
from mlx_empire.optim.compile import fused
from mlx_empire.optim.flat import FlatOptimizer
from mlx_empire.optim.protocol import State, StepScalars


class AdamW(FlatOptimizer):
    """AdamW as a `ShardOptimizer`; see `FlatOptimizer` for `state_bits` and `master_weights`."""

    moments = ("m", "v")

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_bits: int = 32,
        master_weights: str = "exact",
    ) -> None:
        super().__init__(weight_decay, state_bits, master_weights)
        self.betas, self.eps = betas, eps

    def numbers(self, scalars: StepScalars, decay: bool) -> tuple[float, ...]:
        """Betas and 1 - betas, eps, clip scale, lr / correction 1, 1 / correction 2, lr weight_decay."""
        (beta1, beta2), lr = self.betas, scalars.learning_rate
        first, second = (1 - beta**scalars.step for beta in self.betas)
        decayed = lr * self.weight_decay if decay else 0.0
        fixed = (beta1, 1 - beta1, beta2, 1 - beta2, self.eps)
        return (*fixed, scalars.clip_scale, lr / first, 1 / second, decayed)

    def largest_update(self, state: State, step: int) -> mx.array:
        """max |m / (1 - beta1^t)| / (sqrt(v / (1 - beta2^t)) + eps)."""
        m, v = codec.decode(state) if "m_codes" in state else (state["m"], state["v"])
        first, second = (1 - beta**step for beta in self.betas)
        return mx.max(mx.abs(m) * (1 / first) / (mx.sqrt(v * (1 / second)) + self.eps))

    def powers(self, state: State, step: int) -> tuple[mx.array, mx.array]:
        """(sum of m^2, sum of v) over a chunk, each moment divided by its correction; float32 scalars."""
        m, v = codec.decode(state) if "m_codes" in state else (state["m"], state["v"])
        first, second = (1 - beta**step for beta in self.betas)
        return mx.sum(mx.square(m * (1 / first))), mx.sum(v * (1 / second))

    def noise_over_signal(self, of_m: float, of_v: float, step: int) -> float | None:
        """Variance of a step's gradient over its squared mean, from `powers` summed over a model after `step`.

        With mean mu and variance s^2 in every element, E[v] = mu^2 + s^2 and E[m^2] = mu^2 + k s^2, where k is the sum
        of m's squared weights. None where no mean stands out from the noise.
        """
        beta = self.betas[0]
        k = (1 - beta) * (1 + beta**step) / ((1 + beta) * (1 - beta**step))
        if k >= 1:  # after one step m and v say the same
            return None
        variance = (of_v - of_m) / (1 - k)
        mean = of_m - k * variance
        return max(variance, 0.0) / mean if mean > 0 else None

    def _advance(
        self,
        w: mx.array,
        state: State,
        gradient: mx.array,
        numbers: tuple[mx.array, ...],
        keys: mx.array | None,
    ) -> tuple[mx.array, State]:
        if "m_codes" not in state:
            w, m, v = _step(w, state["m"], state["v"], gradient, *numbers)
            return w, {"m": m, "v": v}
        assert keys is not None
        v = codec.decode_second(state)
        w, m, v = _step_from_codes(w, state["m_codes"], codec.first_unit(state), v, gradient, *numbers)
        return w, codec.encode(m, v, keys)


def _adamw(
    w: mx.array,
    m: mx.array,
    v: mx.array,
    gradient: mx.array,
    beta1: mx.array,
    rest1: mx.array,
    beta2: mx.array,
    rest2: mx.array,
    eps: mx.array,
    clip: mx.array,
    rate: mx.array,
    correction2: mx.array,
    decay: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """The rule of the module's docstring, element by element, in float32."""
    g = gradient.astype(mx.float32) * clip
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * (g * g)
    return w - (rate * m / (mx.sqrt(v * correction2) + eps) + decay * w), m, v


def _adamw_from_codes(
    w: mx.array, codes: mx.array, unit: mx.array, v: mx.array, gradient: mx.array, *numbers: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    return _adamw(w, codec.first_value(codes, unit), v, gradient, *numbers)


_step = fused(_adamw)
_step_from_codes = fused(_adamw_from_codes)
