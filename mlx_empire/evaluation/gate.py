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
from dataclasses import dataclass, field
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
    """Watches a gate. `records`: the evaluations before this process began; None for `gate` never lets through.

    `first`: the step whose evaluation is the first that counts.
    """

    def __init__(self, gate: Gate | None, records: Sequence[Mapping[str, Any]] = (), first: int = 0) -> None:
        self._gate, self._first = gate, first
        self._parts = [_Part(one) for one in (gate.parts if gate is not None else ())]
        for record in records:
            self.observe(record)

    def observe(self, record: Mapping[str, Any]) -> bool:
        """Take an evaluation's record; whether the gate is reached with it. One that was made only to compare a run
        with others (`comparison`) is passed over: a run alone would not have it.
        """
        if self._gate is None or int(record["step"]) < self._first or record.get("comparison"):
            return False
        for part in self._parts:
            part.observe(record)
        return self.reached

    @property
    def reached(self) -> bool:
        """Whether the last evaluations, as many as the gate wants, all passed."""
        return bool(self._parts) and all(part.reached for part in self._parts)

    @property
    def asks(self) -> bool:
        """Whether there is a gate at all."""
        return self._gate is not None

    def sentence(self) -> str:
        """What became of the gate, for the user."""
        unmeasured = [part for part in self._parts if not part.values]
        if unmeasured:
            return f"the gate ({unmeasured[0].asked}) was never measured; the result is not frozen"
        if self.reached:
            step = max(part.values[-1][0] for part in self._parts)
            met = "; ".join(f"{p.gate.metric} is {p.values[-1][1]:.4g} ({p.asked})" for p in self._parts)
            return f"the gate is reached at step {step}: {met}"
        missed = "; ".join(part.missed for part in self._parts if not part.reached)
        return f"the gate was not reached: {missed}, so the result is not frozen"


@dataclass
class _Part:
    """One score of a gate: its bound, and (step, value) of the evaluations that had it."""

    gate: Gate
    values: list[tuple[int, float]] = field(default_factory=list)

    def observe(self, record: Mapping[str, Any]) -> None:
        metric = self.gate.metric
        value = record["eval_loss"] if metric == HELD_OUT_LOSS else record.get("scores", {}).get(metric)
        if value is not None:
            self.values.append((int(record["step"]), float(value)))

    @property
    def reached(self) -> bool:
        times = self.gate.times
        return len(self.values) >= times and all(self.gate.passes(value) for _, value in self.values[-times:])

    @property
    def asked(self) -> str:
        gate = self.gate
        bound = f"at least {gate.at_least:g}" if gate.at_least is not None else f"at most {gate.at_most:g}"
        return f"{gate.metric} {bound}" + (f", {gate.times} times in a row" if gate.times > 1 else "")

    @property
    def missed(self) -> str:
        choose = max if self.gate.at_least is not None else min
        best_step, best = choose(self.values, key=lambda pair: pair[1])
        last = self.values[-1][1]
        return f"{self.asked} was asked; it was {best:.4g} at its best (step {best_step}) and {last:.4g} at the end"
