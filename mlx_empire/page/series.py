"""What the records of a run come to as curves: columns of numbers, so that a week of steps stays small in memory, and
thinned before anybody draws them: of a stretch of steps its lowest and highest value stay, so no spike is lost.
"""

from __future__ import annotations

import math
from array import array
from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_empire.run.overview import RECENT

MOST_POINTS = 2000  # of a curve, in what is sent or written
SMOOTHING = 0.9  # of a mean that forgets: about the last ten steps
WAITED, SCORE = "waited:", "score:"  # begin the names of curves that a run may have several of


class Curve:
    """One figure over the steps; `x` and `y` grow together, and what is not finite is left out. `high`: the largest."""

    def __init__(self) -> None:
        self.x, self.y, self.high = array("q"), array("d"), -math.inf

    def __len__(self) -> int:
        return len(self.x)

    def add(self, step: int, value: Any) -> None:
        """Append a value, if it is a finite number."""
        if isinstance(value, int | float) and math.isfinite(value):
            self.x.append(step)
            self.y.append(value)
            self.high = max(self.high, value)

    def points(self, start: int = 0, most: int = MOST_POINTS) -> tuple[list[int], list[float]]:
        """The points from number `start` on, at most `most`: where there are more, of each stretch its lowest and its
        highest one, in their order; the first and the last point always stay. A copy: while an array looks into `x` and
        `y` nothing can be added."""
        x, y = np.array(self.x[start:]), np.array(self.y[start:])
        if len(x) > most:
            kept = _extremes(y, most)
            x, y = x[kept], y[kept]
        return x.tolist(), [float(f"{value:.6g}") for value in y]


class Series:
    """All curves of a run, and of its records what must stay whole.

    recent: the last records of steps. evaluations: the records of evaluations. spikes: steps whose update was left out.
    lost: steps whose loss was not finite. Feed it records in their order with `add`.
    """

    def __init__(self) -> None:
        self.curves: defaultdict[str, Curve] = defaultdict(Curve)
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self.evaluations: list[dict[str, Any]] = []
        self.spikes: list[int] = []
        self.lost: list[int] = []
        self.steps = 0
        self.seconds = 0.0
        self._mean, self._weight = 0.0, 0.0

    def add(self, record: dict[str, Any]) -> None:
        """Take a record in: of an evaluation if it has `eval_loss`, else of a step."""
        step = int(record["step"])
        if "eval_loss" in record:
            self.evaluations.append(record)
            self.curves["held out"].add(step, record["eval_loss"])
            for name, value in _mapping(record.get("scores")).items():
                self.curves[SCORE + name].add(step, value)
            return
        self.steps += 1
        self.recent.append(record)
        for name in ("loss", "grad_norm", "learning_rate", "step_seconds"):
            self.curves[name].add(step, record.get(name))
        for cause, seconds in _mapping(record.get("waited_for")).items():
            self.curves[WAITED + cause].add(step, seconds)
        self._smooth(step, record.get("loss"))
        if record.get("skipped"):
            self.spikes.append(step)
        if isinstance(record.get("step_seconds"), int | float):
            self.seconds += record["step_seconds"]

    def named(self, prefix: str) -> list[str]:
        """What curves with this beginning of their name are about, in the order of their first record."""
        return [name.removeprefix(prefix) for name in self.curves if name.startswith(prefix)]

    def _smooth(self, step: int, loss: Any) -> None:
        """A mean that forgets, without the pull of its own beginning."""
        if not isinstance(loss, int | float) or not math.isfinite(loss):
            self.lost.append(step)
            return
        self._mean = SMOOTHING * self._mean + (1 - SMOOTHING) * loss
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        self.curves["smoothed"].add(step, self._mean / self._weight)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _extremes(values: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most `most` values: the first, the last, and of each stretch between the lowest and the highest."""
    stretches = np.array_split(np.arange(1, len(values) - 1), (most - 2) // 2)
    found = {0, len(values) - 1}
    for places in stretches:
        part = values[places]
        found.update((int(places[part.argmin()]), int(places[part.argmax()])))
    return np.array(sorted(found))
