"""Decides what an optimizer of flat shards is: the seam between the engine and any update rule.

A shard reaches the optimizer chunk by chunk. A chunk is a run of rows of 64 elements of *one* tensor, so an
update needs no layout: it sees `(rows, 64)` arrays, the tensor's id, the chunk's first row within its
tensor and whether weight decay applies. Rows are independent of one another; that is why results do not
depend on how a tensor is cut, hence not on the number of ranks. A rule that needs whole matrices (Muon)
gets another protocol beside this one.

Also which tensors decay (matrices and embeddings; not norms, biases, router corrections or
scales of ternary weights), and what one call needs
beside states, gradients and new weights: measured, by its states' form.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_empire.model.spec import is_offset

# A part of a parameter's name that stands for a normalisation: norm, q_norm, input_layernorm, norm1, ln_f ...
_NORM = re.compile(r"(?:^|_)(?:layer|rms|group)?norm\d*(?:_|$)|^ln(?:_|\d|$)")
_BIAS = re.compile(r"(?:^|_)bias(?:es)?$")  # also e_score_correction_bias, DeepSeek V3's router correction


def decays(name: str, shape: Sequence[int]) -> bool:
    """True if weight decay applies to parameter `name` (dotted, as in an mlx-lm model) of `shape`."""
    parts = name.split(".")
    if len(shape) < 2 or _BIAS.search(parts[-1]) or is_offset(name):
        return False
    return not any(_NORM.search(part) for part in parts)


# Bytes per element of a large chunk, which is evaluated alone: by (8 bits, two moments), then by what is kept beside
# the weights (`float32`: nothing is, nor needed).
_UPDATE: dict[tuple[bool, bool], dict[str, float]] = {
    (False, True): {"float32": 8, "exact": 18, "diet": 21.1, "fp32": 12, "none": 24.1},
    (False, False): {"float32": 8, "exact": 14, "diet": 17.1, "fp32": 8, "none": 20.1},
    (True, True): {"float32": 18.4, "exact": 28.4, "diet": 35.3, "fp32": 22.3, "none": 34.3},
    (True, False): {"float32": 23.8, "exact": 29.8, "diet": 32.8, "fp32": 23.8, "none": 35.8},
}
# Less of that where nobody else holds the weights that are updated: a lone moment's new ones take the place of the old,
# and where fp32 ones are kept the old ones are not read.
_IN_PLACE = {False: {"float32": 4.0, "fp32": 2.0}, True: {"fp32": 2.0}}
# Of 110 tasks, which may wait: a call takes two for each kernel (with 8-bit states 16 or more of them).
_CALLS_AHEAD = {"float32": 38, "fp32": 17}
_SMALL_CHUNKS = 0.83  # of that with 8-bit states for chunks evaluated together: they are freed one by one


class StateCost(dict[str, int]):
    """Bytes of each array of a state, by name; and what an update needs besides, in bytes per element.

    `alone`: of a large chunk, which is evaluated alone; `together`: of small ones that are evaluated at once;
    `in_place`: less of both where nobody else holds the weights;
    `calls_ahead`: how many such calls may be under way where none is waited for, which is until MLX waits.
    """

    def __init__(self, sizes: dict[str, int], moments: tuple[str, ...], master: str, *, codes: bool) -> None:
        """`master`: what completes the weights, or `float32` where they need nothing; `codes`: moments in 8 bits."""
        super().__init__(sizes)
        self.alone: float = _UPDATE[codes, "v" in moments][master]
        self.in_place = _IN_PLACE["v" in moments].get(master, 0.0)
        self.together = _SMALL_CHUNKS * self.alone if codes else self.alone
        self.calls_ahead = 4 if codes else _CALLS_AHEAD.get(master, 10)


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
