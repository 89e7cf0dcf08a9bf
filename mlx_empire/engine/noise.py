"""The randomness of a layer's call (dropout): seeded by a hash of seed, step, micro-batch and layer, never of the rank.

So a recomputed layer sees the masks of its first run, and a result depends neither on the number of ranks nor on
which layers are recomputed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import mlx.core as mx


class LayerNoise:
    """Seeds MLX's generator before each call of a layer in training."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._step = 0
        self._micro_batches: list[int] = []

    def begin(self, step: int, micro_batches: Sequence[int]) -> None:
        """A new step; `micro_batches`: this rank's, numbered over all ranks, in the order in which it runs them."""
        self._step, self._micro_batches = step, list(micro_batches)

    def seed(self, position: int, layer: int) -> None:
        """Before `layer` runs the micro-batch at `position` among this rank's."""
        key = f"{self._seed}:{self._step}:{self._micro_batches[position]}:{layer}"
        mx.random.seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
