"""What the optimizer's state says about its health, every few steps: early signs of trouble with 8-bit states.

- `update_over_lr_max`: the largest element of the update that the stored moments stand for, in learning rates. AdamW
  stays near 1 and never passes a few units; a second moment that was lost shows as tens or hundreds.
- `v_at_floor`, `v_zero`: fractions of second-moment codes at their row's floor, and of zeros. A row's smallest element
  is at its floor, so 1/64 is the least; many more mean that rows span more than 31 octaves.
- `v_bias`: mean of sqrt(v / true v) - 1 over the first row of every tensor in 8 bits. The true v of these rows is
  followed in float64 on the host, from the run's (or the continued run's) start.
- `gradient_noise`: variance of a step's gradient over its squared mean, as AdamW's moments tell it over the last
  1 / (1 - beta2) steps. Times the rows of a step it is the simple noise scale (McCandlish et al., 2018,
  arXiv:1812.06162): far more rows waste compute, far fewer waste steps. Left out where noise is all there is.

All ranks' shards count, so the numbers do not depend on how many there are, but for the last bits.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_empire.comm.protocol import Communicator
from mlx_empire.engine.store import LiveChunk, ShardStore
from mlx_empire.optim import codec
from mlx_empire.optim.adamw import AdamW
from mlx_empire.optim.flat import FlatOptimizer
from mlx_empire.optim.protocol import StepScalars

_KNOWN = 2.0**-90  # smaller true values tell nothing about a code whose zero is below 2^-100


class UpdateStatistics:
    """Looks at this rank's chunks every `every` steps; `see` belongs before each chunk's update."""

    def __init__(self, store: ShardStore, optimizer: FlatOptimizer, comm: Communicator, every: int) -> None:
        self._store, self._optimizer, self._comm, self.every = store, optimizer, comm, every
        self._true: dict[str, np.ndarray] = {}  # tensor -> v of its first row, float64

    def see(self, chunk: LiveChunk, gradient: mx.array, scalars: StepScalars) -> None:
        """Follow the true second moment of a chunk's first row, if it is its tensor's."""
        if chunk.spec.first_row or "v_codes" not in chunk.state or not isinstance(self._optimizer, AdamW):
            return
        beta2, name = self._optimizer.betas[1], chunk.spec.name
        if name not in self._true:
            self._true[name] = self._stored(chunk)
        g = np.array(gradient[:1].astype(mx.float32), np.float64)[0] * scalars.clip_scale
        self._true[name] = beta2 * self._true[name] + (1 - beta2) * g * g

    def measured(self, step: int, updates: int) -> dict[str, float]:
        """The numbers after `step` and so many updates, alike on all ranks; empty for a step that is not looked at.
        Collective."""
        if step % self.every:
            return {}
        largest, sums = 0.0, np.zeros(7)
        for chunk in self._chunks():
            worst, *counts = self._looked_at(chunk, updates)
            largest = float(np.maximum(largest, worst))  # NaN stays visible
            bias = self._bias(chunk)
            sums += [*counts, sum(bias), len(bias)]
        tops, by_rank = zip(*self._comm.gather_json([largest, sums.tolist()]), strict=True)
        floor, zero, codes, of_m, of_v, bias_sum, known = np.sum(by_rank, axis=0).tolist()
        found = {"update_over_lr_max": float(np.max(tops))}
        if codes:
            found |= {"v_at_floor": floor / codes, "v_zero": zero / codes}
        if known:
            found["v_bias"] = bias_sum / known
        if isinstance(self._optimizer, AdamW):
            noise = self._optimizer.noise_over_signal(of_m, of_v, updates)
            found |= {} if noise is None else {"gradient_noise": noise}
        return found

    def _looked_at(self, chunk: LiveChunk, step: int) -> list[float]:
        """Of one chunk: largest update; codes at the floor, at zero, in all; sums of m^2 and of v."""
        zero = mx.array(0.0)
        found = [self._optimizer.largest_update(chunk.state, step), zero, zero, zero, zero, zero]
        if "v_codes" in chunk.state:
            v = chunk.state["v_codes"]
            found[1:4] = mx.sum(v == 1), mx.sum(v == 0), mx.array(v.size)
        if isinstance(self._optimizer, AdamW):
            found[4:6] = self._optimizer.powers(chunk.state, step)
        mx.eval(found)
        return [float(np.array(one)) for one in found]

    def _bias(self, chunk: LiveChunk) -> list[float]:
        if chunk.spec.first_row or chunk.spec.name not in self._true:
            return []
        true, stored = self._true[chunk.spec.name], self._stored(chunk)
        known = true > _KNOWN
        return [float(one) for one in np.sqrt(stored[known] / true[known]) - 1]

    def _stored(self, chunk: LiveChunk) -> np.ndarray:
        first = {name: array[:1] for name, array in chunk.state.items()}
        values: np.ndarray = np.array(codec.decode_second(first), np.float64)[0]
        return values

    def _chunks(self) -> list[LiveChunk]:
        units = zip(self._store.plan.units, self._store.chunks, strict=True)
        pairs = [(s, c) for unit, chunks in units for s, c in zip(unit.segments, chunks, strict=True)]
        return [chunk for segment, own in pairs if segment.kind != "frozen" for chunk in own]
