"""The held-out loss, and when a run has learnt enough: a score beyond its bound at so many evaluations in a row.

The loss is the mean cross-entropy per counted token over the validation split, streamed like a step. The micro-batches
are dealt to the ranks in order, a group at a time, and the losses are summed in the order of the micro-batches in fp64,
so the figure does not depend on the number of ranks.

The gate is a function of the evaluations so far, which stand in metrics.jsonl, so a run that resumes decides as if it
had never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_empire.comm.protocol import Communicator
from mlx_empire.data.batches import MicroBatch, counted
from mlx_empire.engine.step import StreamedStep
from mlx_empire.recipe.evaluation import HELD_OUT_LOSS, Gate


def held_out_loss(
    step: StreamedStep, comm: Communicator, batches: Sequence[MicroBatch], per_rank: int
) -> float:
    """Mean loss over all counted tokens of `batches`; collective.

    At most `per_rank` micro-batches pass a rank at once, so that evaluation needs no more memory than a step. A rank
    whose share of the last group is empty still joins the gathers.
    """
    total = sum(counted(b) for b in batches)
    group = comm.size * per_rank
    losses: list[float] = []
    for first in range(0, len(batches), group):
        start = first + comm.rank * per_rank
        own = step.losses(batches[start : min(start + per_rank, len(batches))], total)
        for values in comm.gather_arrays(np.array(own, np.float64)):
            losses += values.tolist()
    return math.fsum(losses)


class GateKeeper:
    """Watches one score. `records`: the evaluations before this process began; None for `gate` never lets through.

    `first`: the step whose evaluation is the first that counts.
    """

    def __init__(self, gate: Gate | None, records: Sequence[Mapping[str, Any]] = (), first: int = 0) -> None:
        self._gate, self._first = gate, first
        self._values: list[tuple[int, float]] = []
        for record in records:
            self.observe(record)

    def observe(self, record: Mapping[str, Any]) -> bool:
        """Take an evaluation's record; whether the gate is reached with it. One that was made only to compare a run
        with others (`comparison`) is passed over: a run alone would not have it.
        """
        if self._gate is None or int(record["step"]) < self._first or record.get("comparison"):
            return False
        metric = self._gate.metric
        value = record["eval_loss"] if metric == HELD_OUT_LOSS else record.get("scores", {}).get(metric)
        if value is not None:
            self._values.append((int(record["step"]), float(value)))
        return self.reached

    @property
    def reached(self) -> bool:
        """Whether the last evaluations, as many as the gate wants, all passed."""
        if self._gate is None or len(self._values) < self._gate.times:
            return False
        return all(self._gate.passes(value) for _, value in self._values[-self._gate.times :])

    @property
    def asks(self) -> bool:
        """Whether there is a gate at all."""
        return self._gate is not None

    def sentence(self) -> str:
        """What became of the gate, for the user."""
        assert self._gate is not None
        gate = self._gate
        bound = f"at least {gate.at_least:g}" if gate.at_least is not None else f"at most {gate.at_most:g}"
        asked = f"{gate.metric} {bound}" + (f", {gate.times} times in a row" if gate.times > 1 else "")
        if not self._values:
            return f"the gate ({asked}) was never measured; the result is not frozen"
        step, last = self._values[-1]
        if self.reached:
            return f"the gate is reached at step {step}: {gate.metric} is {last:.4g} ({asked})"
        choose = max if gate.at_least is not None else min
        best_step, best = choose(self._values, key=lambda pair: pair[1])
        return (
            f"the gate was not reached: {asked} was asked; it was {best:.4g} at its best (step {best_step}) and "
            f"{last:.4g} at the end, so the result is not frozen"
        )
