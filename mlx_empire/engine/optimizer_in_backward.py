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

from mlx_empire import progress
from mlx_empire.engine.update import Updater
from mlx_empire.optim.norm import NormLayout


class OptimizerInBackward(Updater):
    """Applies a unit's finished total at once: `norm_of` and `update` are played in the backward, once a unit."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.last_norm = 0.0
        self.updated = 0  # units, in this step
        self._step: tuple[int, float] = (0, 0.0)
        self._squares = 0.0
        units = self._store.plan.units
        self._layouts = {unit.index: NormLayout.of_units([unit]) for unit in units}

    def begin_step(self, step: int, learning_rate: float) -> None:
        """The backward of `step` begins."""
        self._step, self._squares, self.updated = (step, learning_rate), 0.0, 0

    def norm_of(self, index: int) -> None:
        """The unit's totals are complete on all ranks: check, and clip its update. Collective. GradientError."""
        progress.reach("optimizer")
        unit = self._store.plan.units[index]
        self._squares += self._norm_of(self._layouts[index], [unit]) ** 2
        scalars = self.clipped(*self._step, max(self.last_norm, sqrt(self._squares)))
        self.begin(lambda name: scalars)

    def update(self, index: int) -> None:
        """As `Updater.update`, and counted."""
        super().update(index)
        self.updated += 1

    def end(self) -> float:
        """The backward has ended and every unit was updated; returns the step's global norm before clipping."""
        self.last_norm = sqrt(self._squares)
        return self.last_norm

    @property
    def changed(self) -> str:
        """What an error says of the weights."""
        if not self.updated:
            return super().changed
        whole = sum(bool(layout.edges) for layout in self._layouts.values())
        return f"{self.updated} of {whole} units were updated already (optimizer.in_backward): go on from a checkpoint"
