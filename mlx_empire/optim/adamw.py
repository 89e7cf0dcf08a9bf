"""Decides AdamW's step on one chunk: the textbook's rule in float32, exact masters, 8-bit states if asked.

    g = clip_scale * gradient
    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    w = w - (lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps) + lr weight_decay w)

Decoupled decay, bias correction, eps outside the root (Loshchilov and Hutter, 2019, algorithm 2). The decay
is subtracted together with the update: one rounding, and a factor 1 - lr weight_decay that float32 cannot
hold is not needed. Everything that depends on the step alone is computed in float64 on the host and rounded
once.

State arrays, all with one row per row of weights:
- float32 states: `m`, `v` (rows, 64);  8-bit states: the five arrays of `codec`, updated from un-quantised
  m and v;
- bfloat16 weights also have `remainder`, int16 (rows, 64): `master` joins both to the float32 weight.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_empire.errors import UserError
from mlx_empire.optim import codec, master
from mlx_empire.optim.fusion import compiling_alone, fused
from mlx_empire.optim.noise import row_keys
from mlx_empire.optim.protocol import ChunkId, State, StepScalars
from mlx_empire.plan.model import BLOCK
from mlx_empire.recipe.schema import OptimizerSection


class AdamW:
    """AdamW as a `ShardOptimizer`. `state_bits`: 32 or 8; 8 holds only for chunks with `quantised=True`."""

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_bits: int = 32,
    ) -> None:
        assert state_bits in (8, 32)
        self.betas, self.eps, self.weight_decay, self.state_bits = betas, eps, weight_decay, state_bits
        beta1, beta2 = betas
        self._fixed = _scalars(beta1, 1 - beta1, beta2, 1 - beta2, eps)
        self._step: tuple[StepScalars, dict[bool, tuple[mx.array, ...]]] | None = None
        self._seen: set[tuple[object, ...]] = set()

    def init(self, weights: mx.array, *, quantised: bool) -> State:
        """Zero moments for `weights` (rows, 64), and a zero remainder where they are bfloat16."""
        rows = weights.shape[0]
        if quantised and self.state_bits == 8:
            state = codec.empty_codes(rows)
        else:
            state = {"m": mx.zeros((rows, BLOCK)), "v": mx.zeros((rows, BLOCK))}
        if weights.dtype == mx.bfloat16:
            state["remainder"] = mx.zeros((rows, BLOCK), mx.int16)
        return state

    def update(
        self, weights: mx.array, state: State, gradient: mx.array, chunk: ChunkId, scalars: StepScalars
    ) -> tuple[mx.array, State]:
        """One step. See `ShardOptimizer.update`; the form of `state` decides the form of the new one."""
        kind = (weights.dtype, gradient.dtype, frozenset(state))
        if kind not in self._seen:
            self._seen.add(kind)
            self._compile(weights, state, gradient)
        exact, codes = "remainder" in state, "m_codes" in state
        w = master.join(weights, state["remainder"]) if exact else weights
        numbers = (*self._fixed, *self._step_scalars(scalars, chunk.decay))
        new: State
        if codes:
            v = codec.decode_second(state)
            w, m, v = _step_from_codes(w, state["m_codes"], codec.first_unit(state), v, gradient, *numbers)
            keys = row_keys(w.shape[0], chunk.tensor, chunk.first_row, scalars.step, scalars.salt)
            new = codec.encode(m, v, keys)
        else:
            w, m, v = _step(w, state["m"], state["v"], gradient, *numbers)
            new = {"m": m, "v": v}
        if exact:
            w, new["remainder"] = master.split(w)
        return w, new

    def state_bytes(self, elements: int, weight_dtype: str, *, quantised: bool) -> dict[str, int]:
        """Bytes by name of the arrays that `init` makes for `elements` weights of a plan's dtype."""
        assert elements % BLOCK == 0
        if quantised and self.state_bits == 8:
            rows = elements // BLOCK
            sizes = {name: elements * each + rows * row for name, (each, row) in codec.STATE_BYTES.items()}
        else:
            sizes = {"m": 4 * elements, "v": 4 * elements}
        if weight_dtype == "bfloat16":
            sizes["remainder"] = 2 * elements
        return sizes

    def convert(self, state: State, chunk: ChunkId, scalars: StepScalars, *, quantised: bool) -> State:
        """`state` from a run with other `state_bits`, decoded or encoded; any other is returned as it is."""
        codes = quantised and self.state_bits == 8
        if codes == ("m_codes" in state):
            return state
        kept = {"remainder": state["remainder"]} if "remainder" in state else {}
        if not codes:
            m, v = codec.decode(state)
            return {"m": m, "v": v, **kept}
        keys = row_keys(state["m"].shape[0], chunk.tensor, chunk.first_row, scalars.step, scalars.salt)
        return {**codec.encode(state["m"], state["v"], keys), **kept}

    def _step_scalars(self, scalars: StepScalars, decay: bool) -> tuple[mx.array, ...]:
        """(clip, lr / correction 1, 1 / correction 2, lr weight_decay), made once a step."""
        if self._step is None or self._step[0] != scalars:
            assert scalars.step >= 1
            lr = scalars.learning_rate
            first, second = (1 - beta**scalars.step for beta in self.betas)
            common = _scalars(scalars.clip_scale, lr / first, 1 / second)
            off, on = _scalars(0.0, lr * self.weight_decay)
            self._step = (scalars, {False: (*common, off), True: (*common, on)})
        return self._step[1][decay]

    def _compile(self, weights: mx.array, state: State, gradient: mx.array) -> None:
        """Have the kernels of this kind of chunk built, one process at a time.

        A single row has kernels of its own; tensors with codes are too large to be one, but for a cut's rest.
        """
        with compiling_alone():
            for rows in (2,) if "m_codes" in state else (1, 2):
                tiny = {name: mx.zeros((rows, a.shape[1]), a.dtype) for name, a in state.items()}
                w, g = (mx.zeros((rows, BLOCK), a.dtype) for a in (weights, gradient))
                mx.eval(self.update(w, tiny, g, ChunkId(0, 0, True), StepScalars(1, 0.0)))


def make_optimizer(section: OptimizerSection) -> AdamW:
    """The optimizer that a recipe asks for."""
    for key, built in (("name", "adamw"), ("master_weights", "exact")):
        if (value := getattr(section, key)) != built:
            raise UserError(f"optimizer.{key}: {value} is not built yet; use {built}")
    return AdamW(section.betas, section.eps, section.weight_decay, section.state_bits)


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


def _scalars(*values: float) -> tuple[mx.array, ...]:
    arrays = tuple(mx.array(value, mx.float32) for value in values)
    mx.eval(arrays)
    return arrays
