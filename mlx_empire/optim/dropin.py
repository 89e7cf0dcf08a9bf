"""Decides how 8-bit AdamW looks to anyone's MLX loop: a `mlx.optimizers.Optimizer` over the flat rule.

A parameter becomes rows of 64 elements, padded with zeros, and is stepped in chunks, one after the other, so that
temporaries stay small. As in the trainer, tensors with fewer than two dimensions or 4,096 elements and routers keep
their moments in float32. The rounding noise hashes the parameter's dotted name, its place and the step.

The step counter is an array, so that a step can be compiled (mlx-lm's trainer does). What depends on it is computed
in float64 on the CPU's stream: the same numbers that the trainer's optimizer computes on the host, hence the same
bits. State is plain arrays under the parameters' names: `tree_flatten(optimizer.state)` saves it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer
from mlx.utils import tree_map, tree_map_with_path

from mlx_empire.model.spec import BLOCK, TensorSpec
from mlx_empire.optim.adamw import AdamW
from mlx_empire.optim.flat import as_arrays
from mlx_empire.optim.protocol import State
from mlx_empire.optim.rounding import row_keys
from mlx_empire.plan.shards import CHUNK_ELEMENTS

_CHUNK_ROWS = CHUNK_ELEMENTS // BLOCK
_PARTS = "parts"  # name of the list of chunks in a large parameter's state


class AdamW8bit(Optimizer):
    """AdamW with 8-bit moments and exact master weights, in 2.1 + 2 bytes per bfloat16 parameter.

    Takes the place of `mlx.optimizers.AdamW` and has its arguments, but `bias_correction` is on by default, as in
    the paper. Parameters may be bfloat16, float32 or float16 (which keeps a float32 master).

    learning_rate: a number, or a function of the step (an array) such as MLX's schedules.
    state_bits: 8, or 32 for float32 moments.
    master_weights: what is kept beside a bfloat16 parameter: exact (2 bytes: trains bit for bit like a float32
        copy), diet (1 byte), fp32 (4 bytes, the same result as exact) or none; see `master`.
    salt: separates the rounding noise of runs that must not share it.
    """

    def __init__(
        self,
        learning_rate: float | Callable[[mx.array], mx.array],
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        *,
        state_bits: int = 8,
        master_weights: str = "exact",
        salt: int = 0,
    ) -> None:
        super().__init__()
        beta1, beta2 = betas
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"betas: {list(betas)}: each must be from 0 to below 1")
        if state_bits not in (8, 32):
            raise ValueError(f"state_bits: {state_bits}: must be 8 or 32")
        if master_weights not in ("exact", "diet", "fp32", "none"):
            raise ValueError(f"master_weights: {master_weights}: must be exact, diet, fp32 or none")
        self._maybe_schedule("learning_rate", learning_rate)
        self.betas, self.eps, self.weight_decay = [beta1, beta2], eps, weight_decay
        self.bias_correction, self.salt = bias_correction, salt
        self._rule = AdamW((beta1, beta2), eps, weight_decay, state_bits, master_weights)
        self._fixed = as_arrays(beta1, 1 - beta1, beta2, 1 - beta2, eps, 1.0)

    # ---- MLX's protocol

    def init(self, parameters: dict[str, Any]) -> None:
        """State for every parameter of a tree that has none yet."""
        super().init(parameters)
        tree_map_with_path(self._begin, parameters, self.state)

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        """Nothing: a state's form depends on the parameter's name too, so `init` makes it."""

    def apply_gradients(self, gradients: dict[str, Any], parameters: dict[str, Any]) -> Any:
        """The updated parameters, in the tree of `gradients`; `parameters` may have more."""
        if not self._initialized:
            self.init(tree_map(lambda _, p: p, gradients, parameters))
        for name, schedule in self._schedulers.items():
            self.state[name] = schedule(self.step)
        self.state["step"] = self.step + 1
        numbers = self._numbers()

        def apply(path: str, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
            return self._apply(zlib.crc32(path.encode()), gradient, parameter, state, numbers)

        return tree_map_with_path(apply, gradients, parameters, self.state)

    # ---- one parameter

    def _begin(self, path: str, parameter: mx.array, state: dict[str, Any]) -> None:
        if state:
            return
        if parameter.dtype not in (mx.float32, mx.bfloat16, mx.float16):
            raise ValueError(f"{path}: {parameter.dtype} parameters cannot be trained")
        quantised = TensorSpec(path, tuple(parameter.shape), "").kind == "trainable"
        state[_PARTS] = []
        for rows in _chunks(_rows(parameter)):
            wide = rows.astype(mx.float32) if rows.dtype == mx.float16 else rows
            part = self._rule.init(wide, quantised=quantised)
            state[_PARTS].append(part | ({"wide": wide} if rows.dtype == mx.float16 else {}))

    def _apply(
        self,
        tensor: int,
        gradient: mx.array,
        parameter: mx.array,
        state: dict[str, Any],
        numbers: tuple[mx.array, ...],
    ) -> mx.array:
        done: list[mx.array] = []
        pairs = zip(_chunks(_rows(parameter)), _chunks(_rows(gradient)), strict=True)
        for i, (w, g) in enumerate(pairs):
            part: State = dict(state[_PARTS][i])
            if done:  # one chunk after the other: otherwise the temporaries of all may be alive at once
                (g,) = mx.depends([g], [done[-1]])
            w = part.pop("wide", w)
            keys = None
            if self._rule.draws(w, part):
                keys = row_keys(w.shape[0], tensor, i * _CHUNK_ROWS, self.step, self.salt)
            w, new = self._rule.step(w, part, g, numbers, keys)
            if parameter.dtype == mx.float16:
                new["wide"] = w
            state[_PARTS][i].update(new)
            done.append(w.astype(parameter.dtype))
        whole = done[0] if len(done) == 1 else mx.concatenate(done)
        return whole.reshape(-1)[: parameter.size].reshape(parameter.shape)

    def _numbers(self) -> tuple[mx.array, ...]:
        """`AdamW.numbers` of the current step, as float32 scalars; Metal has no float64, the CPU's stream has."""
        with mx.stream(mx.cpu):
            lr, step = self.learning_rate.astype(mx.float64), self.step.astype(mx.float64)
            one = mx.array(1.0, mx.float64)
            rate, correction = lr, one
            if self.bias_correction:
                first, second = (one - mx.power(mx.array(b, mx.float64), step) for b in self.betas)
                rate, correction = lr / first, one / second
            decay = lr * mx.array(self.weight_decay, mx.float64)
            return (*self._fixed, *(x.astype(mx.float32) for x in (rate, correction, decay)))


def _rows(array: mx.array) -> mx.array:
    """(rows, 64) of an array of any shape, padded with zeros."""
    flat = array.reshape(-1)
    rest = -flat.size % BLOCK
    if rest:
        flat = mx.concatenate([flat, mx.zeros(rest, flat.dtype)])
    return flat.reshape(-1, BLOCK)


def _chunks(rows: mx.array) -> list[mx.array]:
    if rows.shape[0] <= _CHUNK_ROWS:
        return [rows]
    return [rows[start : start + _CHUNK_ROWS] for start in range(0, rows.shape[0], _CHUNK_ROWS)]
