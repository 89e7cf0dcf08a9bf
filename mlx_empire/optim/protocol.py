"""Decides what an optimizer of flat shards is: the seam between the engine and any update rule.

A shard reaches the optimizer chunk by chunk. A chunk is a run of rows of 64 elements of *one* tensor, so an
update needs no layout: it sees `(rows, 64)` arrays, the tensor's id, the chunk's first row within its
tensor and whether weight decay applies. Rows are independent of one another; that is why results do not
depend on how a tensor is cut, hence not on the number of ranks. A rule that needs whole matrices (Muon)
gets another protocol beside this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_empire.optim.updating import StateCost

State = dict[str, mx.array]


@dataclass(frozen=True)
class ChunkId:
    """Which part of the model a chunk is.

    `tensor`: a stable id of the tensor, 32 bits. `first_row`: row (of 64 elements) within the tensor, below
    2**32. `decay`: whether weight decay applies.
    """

    tensor: int
    first_row: int
    decay: bool


@dataclass(frozen=True)
class StepScalars:
    """What all chunks of one step share.

    `step` counts from 1. `clip_scale` multiplies every gradient first. `salt` separates the rounding noise
    of runs that must not share it.
    """

    step: int
    learning_rate: float
    clip_scale: float = 1.0
    salt: int = 0


class ShardOptimizer(Protocol):
    """An update rule on chunks. Every method is pure; arrays are lazy, the caller evaluates."""

    def init(self, weights: mx.array, *, quantised: bool) -> State:
        """State for `weights` (rows, 64), bfloat16 or float32. `quantised`: 8-bit codes may be used."""
        ...

    def update(
        self, weights: mx.array, state: State, gradient: mx.array, chunk: ChunkId, scalars: StepScalars
    ) -> tuple[mx.array, State]:
        """New weights (same shape and dtype) and state; `gradient` is (rows, 64), float32 or bfloat16."""
        ...

    def convert(self, state: State, chunk: ChunkId, scalars: StepScalars, *, quantised: bool) -> State:
        """`state` from a run with other `state_bits`, decoded or encoded; any other is returned as it is."""
        ...

    def state_bytes(self, elements: int, weight_dtype: str, *, quantised: bool) -> StateCost:
        """Exact bytes of each state array of `elements` (a multiple of 64) weights; what an update needs besides."""
        ...
