"""Gradient release: every unit is updated as soon as its gradient is complete, and the gradient is never kept.

A step is layer-major, so a unit's gradient is complete after one visit, however many micro-batches there are. The
update runs on the main thread when the unit's reduction is done, while nothing else of the backward computes.

Clipping. The step's norm is known only at its end, so a unit is clipped by the largest of what is known:

    n = max(global norm of the last step, norm of this step's units so far, this one included)
    scale = min(1, clip_norm / n)

in the fixed order of the backward: last layer first, the root last. The first step has only the second part. A leap
is thus held back within its own step: no unit moves as if its own gradient were longer than clip_norm. All numbers
are summed in fixed trees, so every rank and any number of ranks gets the same. `last_norm` belongs into a checkpoint.

Numbers that are not finite. A unit's gradient is checked before the unit is updated, on all ranks. Units that were
updated earlier in the step cannot be undone, and the error says how many: a run goes on from its last checkpoint.
A loss that is not finite makes the last layer's gradient so, which is the first one: then nothing was changed.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

from mlx_empire import phases
from mlx_empire.engine.update import Updater
from mlx_empire.optim.norm import NormLayout, clip_scale
from mlx_empire.optim.protocol import StepScalars


class ReleasingUpdater(Updater):
    """Applies a unit's finished total at once. Between `begin` and `end`, `complete(unit)` is called once a unit."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.last_norm = 0.0
        self.updated = 0  # units, in this step
        self._step: tuple[int, float] | None = None
        self._squares = 0.0
        units = self._store.plan.units
        self._layouts = {unit.index: NormLayout.of_units([unit]) for unit in units}

    def begin(self, step: int, learning_rate: float) -> None:
        """The backward of `step` begins."""
        self._step, self._squares, self.updated = (step, learning_rate), 0.0, 0

    def complete(self, index: int) -> None:
        """The unit's totals are complete on all ranks: check, clip, update. Collective. GradientError."""
        unit, layout = self._store.plan.units[index], self._layouts[index]
        if self._step is None or not layout.edges:  # gradients alone are wanted, or there are none
            return
        phases.reach("optimizer")
        self._squares += self._norm_of(layout, [unit]) ** 2
        step, learning_rate = self._step
        known = max(self.last_norm, sqrt(self._squares))
        scalars = StepScalars(step, learning_rate, clip_scale(known, self._clip_norm))
        self._update_unit(unit, lambda name: scalars)
        self.updated += 1

    def end(self) -> float:
        """The backward has ended and every unit was updated; returns the step's global norm before clipping."""
        self._adopt_renewed()
        self._sums.clear()
        self._step, self.last_norm = None, sqrt(self._squares)
        return self.last_norm

    @property
    def changed(self) -> str:
        """What an error says of the weights."""
        if not self.updated:
            return super().changed
        whole = sum(bool(layout.edges) for layout in self._layouts.values())
        return f"{self.updated} of {whole} units were updated already (optimizer.in_backward): go on from a checkpoint"
