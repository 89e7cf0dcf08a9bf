"""Numbers that are wrong: loss and gradient norm that leap, and which tensor of which rank is not finite.

A value is scored against the last `window` ones by median and median absolute deviation, which a few outliers do not
move: score = (value - median) / (1.4826 MAD), the factor making MAD a standard deviation for normal noise. Only leaps
upwards count. Decided from numbers that all ranks share, so all decide alike.

- log:  say it, and train on.
- skip: leave this step's update out; weights and optimizer state stay as they are, and the value does not enter the
        window. More than `max_skips` skipped steps within the last `window` ones end the run.
- rollback: skip, and go back to the weights and states of the last checkpoint; the steps since then are not repeated,
        for they would lead to the same leap. Training goes on with the data after the leap. Bounded like skips.

What is not finite is looked for only then, so it may take its time; that changes nothing, and is collective where it
says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_empire.comm.protocol import Communicator
from mlx_empire.engine.store import LiveChunk, ShardStore
from mlx_empire.errors import NumericsError, on_all_ranks
from mlx_empire.model.spec import BLOCK
from mlx_empire.optim.norm import block_sums

Mode = Literal["off", "log", "skip", "rollback"]
LEAST_HISTORY = 16  # below that nothing is judged
LEAST_SPREAD = 0.005  # of the median: a plateau's noise may be next to nothing
MAD_TO_SIGMA = 1.4826


@dataclass(frozen=True)
class Verdict:
    """What to do with a step's update; `note` is what there is to say, if anything. `back`: and then go back."""

    skip: bool = False
    back: bool = False
    note: str | None = None


@dataclass
class SpikeWatch:
    """The values seen, and the steps skipped. What `to_json` gives belongs into a checkpoint."""

    mode: Mode = "log"
    threshold: float = 10.0
    window: int = 64
    max_skips: int = 8
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)

    def judge(self, step: int, loss: float, norm: float) -> Verdict:
        """The verdict on step `step`, whose values are finite. NumericsError (on all ranks) for too many skips."""
        if self.mode == "off":
            return Verdict()
        scores = {"loss": spike_score(loss, self.losses), "gradient norm": spike_score(norm, self.norms)}
        values = {"loss": loss, "gradient norm": norm}
        worst = max(scores, key=lambda name: scores[name])
        if scores[worst] <= self.threshold:
            self._remember(loss, norm)
            return Verdict()
        history = self.losses if worst == "loss" else self.norms
        told = (
            f"step {step}: {worst} {values[worst]:.4g} leaps from {median(history):.4g} "
            f"(score {scores[worst]:.1f} above {self.threshold:g})"
        )
        if self.mode == "log":
            self._remember(loss, norm)
            return Verdict(note=told)
        self.skipped = [s for s in self.skipped if s > step - self.window] + [step]
        if len(self.skipped) > self.max_skips:
            raise on_all_ranks(
                NumericsError(
                    f"{told}: {len(self.skipped)} steps of the last {self.window} would be skipped, more than "
                    f"numerics.max_skips {self.max_skips}; lower the learning rate or look at the data of steps "
                    f"{', '.join(map(str, self.skipped))}"
                )
            )
        back = self.mode == "rollback"
        return Verdict(True, back, f"{told}; {'the run goes back' if back else 'its update is skipped'}")

    def to_json(self) -> dict[str, Any]:
        """What a continued run needs to decide alike; floats survive JSON bit by bit."""
        return {"losses": list(self.losses), "norms": list(self.norms), "skipped": list(self.skipped)}

    def from_json(self, state: Mapping[str, Any]) -> None:
        """Take over what `to_json` gave; the settings stay this run's own."""
        self.losses = [float(value) for value in state["losses"]][-self.window :]
        self.norms = [float(value) for value in state["norms"]][-self.window :]
        self.skipped = [int(step) for step in state["skipped"]]

    def _remember(self, loss: float, norm: float) -> None:
        self.losses = [*self.losses, loss][-self.window :]
        self.norms = [*self.norms, norm][-self.window :]


def spike_score(value: float, history: list[float]) -> float:
    """How many robust standard deviations `value` lies above the history's median; 0 while there is too little."""
    if len(history) < LEAST_HISTORY:
        return 0.0
    middle = median(history)
    spread = MAD_TO_SIGMA * median(abs(one - middle) for one in history)
    return (value - middle) / max(spread, LEAST_SPREAD * abs(middle), 1e-12)


class GradientError(NumericsError):
    """The summed gradient of `tensors` is not finite; whose contribution it was is not known yet."""

    shared = True

    def __init__(self, tensors: Sequence[str]) -> None:
        super().__init__(f"the gradient of {some_of(tensors)} is not finite; no weight was changed")
        self.tensors = tensors


def some_of(tensors: Sequence[str]) -> str:
    """The first name, and how many there are."""
    return tensors[0] if len(tensors) == 1 else f"{tensors[0]} (and of {len(tensors) - 1} other tensors)"


def bad_totals(
    store: ShardStore,
    totals: dict[int, list[mx.array]],
    segments: Collection[tuple[int, int]],
    comm: Communicator,
) -> list[str]:
    """The tensors whose summed gradient is not finite, or too large to be squared, in the plan's order. Collective.

    segments: (unit, position among the unit's trained segments) that are known to hold such a tensor.
    """
    own = set()
    for unit, position in segments:
        total = totals[unit][position]
        trained = [s for s, segment in enumerate(store.plan.units[unit].segments) if segment.kind != "frozen"]
        segment = store.plan.units[unit].segments[trained[position]]
        first = store.plan.state_interval(segment, comm.rank)[0] // BLOCK
        for chunk in store.chunks[unit][trained[position]]:
            a = chunk.spec.start_row - first
            if chunk.spec.name not in own and not _finite(*block_sums(total[a : a + chunk.spec.rows])):
                own.add(chunk.spec.name)
    return _in_order(store, [name for names in comm.gather_json(sorted(own)) for name in names])


def bad_weights(store: ShardStore, comm: Communicator) -> list[tuple[str, int]]:
    """(tensor, lowest rank that holds such a part of it) of all weights that are not finite. Collective."""
    own = {c.spec.name for c in _chunks(store) if not _finite(*block_sums(c.weights))}
    ranks: dict[str, int] = {}
    for rank, names in enumerate(comm.gather_json(sorted(own))):
        for name in names:
            ranks.setdefault(name, rank)
    return [(name, ranks[name]) for name in _in_order(store, ranks)]


def _chunks(store: ShardStore) -> Iterator[LiveChunk]:
    """This rank's chunks of floating-point weights."""
    for unit in store.chunks:
        for segment in unit:
            yield from (c for c in segment if mx.issubdtype(c.weights.dtype, mx.floating))


def _finite(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all())


def _in_order(store: ShardStore, names: Collection[str]) -> list[str]:
    """Without doubles, in the plan's order."""
    wanted = set(names)
    return [name for name in store.plan.tensors if name in wanted]
