"""Decides what every update rule on chunks has in common: the forms of its state, masters, conversion, kernels.

A rule says which moments it has and how one step advances them, element by element in float32. Its state has one
row per row of weights:
- moments in float32, `m` and perhaps `v` (rows, 64), or in 8 bits, the arrays of `codec`, updated from
  un-quantised moments;
- beside bfloat16 and float16 weights what `master` keeps of the float32 weight: one array, or nothing.

Everything that depends on the step alone is computed in float64 on the host and rounded once (`numbers`). `step`
takes these numbers and the rounding noise's keys as arrays, so that a caller whose step counter is itself an array
(`dropin`) uses the same rule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import mlx.core as mx

from mlx_empire.model.spec import BLOCK
from mlx_empire.optim import codec, master
from mlx_empire.optim.compile import compiling_alone
from mlx_empire.optim.protocol import ChunkId, State, StateCost, StepScalars
from mlx_empire.optim.rounding import row_keys

STATES = frozenset(  # the name of everything that a state may hold
    [
        *codec.ARRAYS,
        *(name for arrays in codec.ARRAYS.values() for name in arrays),
        *(name for name, _ in master.KEPT.values()),
    ]
)
KNOWN_STEPS = 64  # daughters that are trained together are at different steps


class FlatOptimizer(ABC):
    """A `ShardOptimizer`. `state_bits`: 32 or 8; 8 holds only for chunks with `quantised=True`.

    `master_weights`: one of `master.KINDS`; without meaning for float32 weights.
    """

    moments: ClassVar[tuple[str, ...]]

    def __init__(
        self, weight_decay: float = 0.0, state_bits: int = 32, master_weights: str = "exact"
    ) -> None:
        assert state_bits in (8, 32)
        assert master_weights in master.KINDS
        self.weight_decay, self.state_bits, self.master_weights = weight_decay, state_bits, master_weights
        self._steps: dict[StepScalars, dict[bool, tuple[mx.array, ...]]] = {}
        self._seen: set[tuple[object, ...]] = set()

    # ---- what a rule says

    @abstractmethod
    def numbers(self, scalars: StepScalars, decay: bool) -> tuple[float, ...]:
        """What the rule needs to know of the step, in float64; `decay`: whether weight decay applies."""

    @abstractmethod
    def _advance(
        self,
        w: mx.array,
        state: State,
        gradient: mx.array,
        numbers: tuple[mx.array, ...],
        keys: mx.array | None,
    ) -> tuple[mx.array, State]:
        """New float32 weights and moments in the form that `state` has; `keys` where codes are drawn."""

    @abstractmethod
    def largest_update(self, state: State, step: int) -> mx.array:
        """The largest element of the update that a state after `step` stands for, over the learning rate; a scalar."""

    # ---- the protocol

    def init(self, weights: mx.array, *, quantised: bool) -> State:
        """Zero moments for `weights` (rows, 64), and where they are bfloat16 what completes them."""
        rows = weights.shape[0]
        if quantised and self.state_bits == 8:
            state = codec.empty_codes(rows, self.moments)
        else:
            state = {name: mx.zeros((rows, BLOCK)) for name in self.moments}
        if weights.dtype != mx.float32:
            name = "bfloat16" if weights.dtype == mx.bfloat16 else "float16"
            state |= master.first_state(weights, master.completing(name, self.master_weights))
        return state

    def update(
        self, weights: mx.array, state: State, gradient: mx.array, chunk: ChunkId, scalars: StepScalars
    ) -> tuple[mx.array, State]:
        """One step. See `ShardOptimizer.update`; the form of `state` decides the form of the new one."""
        kind = (weights.dtype, gradient.dtype, frozenset(state))
        if kind not in self._seen:
            self._seen.add(kind)
            self._compile(weights, state, gradient)
        keys = None
        if self.draws(weights, state):
            keys = row_keys(weights.shape[0], chunk.tensor, chunk.first_row, scalars.step, scalars.salt)
        return self.step(weights, state, gradient, self._arrays(scalars, chunk.decay), keys)

    def step(
        self,
        weights: mx.array,
        state: State,
        gradient: mx.array,
        numbers: tuple[mx.array, ...],
        keys: mx.array | None,
    ) -> tuple[mx.array, State]:
        """`update` with the step's `numbers` (float32 scalars) and, where `draws` says so, `keys` (rows, 1)."""
        if weights.dtype == mx.float32:
            return self._advance(weights, state, gradient, numbers, keys)
        w, new = self._advance(master.joined(weights, state), state, gradient, numbers, keys)
        if weights.dtype == mx.float16:
            weights, kept = master.in_half(w)
        else:
            weights, kept = master.parted(w, self.master_weights, keys)
        return weights, new | kept

    def draws(self, weights: mx.array, state: State) -> bool:
        """Whether a step on these arrays rounds at random."""
        lossy = weights.dtype == mx.bfloat16 and self.master_weights in ("diet", "none")
        return lossy or "m_codes" in state

    def state_bytes(self, elements: int, weight_dtype: str, *, quantised: bool) -> StateCost:
        """Bytes by name of the arrays that `init` makes for `elements` weights of a plan's dtype."""
        assert elements % BLOCK == 0
        codes = quantised and self.state_bits == 8
        if codes:
            sizes = codec.code_bytes(elements // BLOCK, self.moments)
        else:
            sizes = {name: 4 * elements for name in self.moments}
        completed = master.completing(weight_dtype, self.master_weights)
        if completed in master.KEPT:
            name, dtype = master.KEPT[completed]
            sizes[name] = dtype.size * elements
        return StateCost(sizes, self.moments, completed, codes=codes)

    def convert(self, state: State, chunk: ChunkId, scalars: StepScalars, *, quantised: bool) -> State:
        """`state` from a run with other `state_bits`, decoded or encoded; any other is returned as it is."""
        codes = quantised and self.state_bits == 8
        if codes == ("m_codes" in state):
            return state
        kept = {name: state[name] for name, _ in master.KEPT.values() if name in state}
        if not codes:
            decoders = {"m": codec.decode_first, "v": codec.decode_second}
            return {name: decoders[name](state) for name in self.moments} | kept
        rows = state["m"].shape[0]
        keys = row_keys(rows, chunk.tensor, chunk.first_row, scalars.step, scalars.salt)
        if "v" in self.moments:
            return codec.encode(state["m"], state["v"], keys) | kept
        return codec.encode_lone_first(state["m"], keys) | kept

    # ---- once a step, once a kind of chunk

    def _arrays(self, scalars: StepScalars, decay: bool) -> tuple[mx.array, ...]:
        if scalars not in self._steps:
            assert scalars.step >= 1
            if len(self._steps) >= KNOWN_STEPS:
                self._steps.clear()
            self._steps[scalars] = {on: as_arrays(*self.numbers(scalars, on)) for on in (False, True)}
        return self._steps[scalars][decay]

    def _compile(self, weights: mx.array, state: State, gradient: mx.array) -> None:
        """Have the kernels of this kind of chunk built, one process at a time.

        A single row has kernels of its own; tensors with codes are too large to be one, but for a cut's rest.
        """
        with compiling_alone():
            for rows in (2,) if "m_codes" in state else (1, 2):
                tiny = {name: mx.zeros((rows, a.shape[1]), a.dtype) for name, a in state.items()}
                w, g = (mx.zeros((rows, BLOCK), a.dtype) for a in (weights, gradient))
                mx.eval(self.update(w, tiny, g, ChunkId(0, 0, True), StepScalars(1, 0.0)))


def as_arrays(*values: float) -> tuple[mx.array, ...]:
    """Float32 scalars, evaluated."""
    arrays = tuple(mx.array(value, mx.float32) for value in values)
    mx.eval(arrays)
    return arrays
