"""What the pairs of runs say: medians over the pairs of one ZeRO stage, against what is asked of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from launching import Run, Setting
from rich.table import Table

LEAST_RATIO = {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.95}  # targets per second by ZeRO stage, ours over mlx-lm's
MOST_EXPOSED = 0.10  # of a step's time, at stage 3


@dataclass(frozen=True)
class Pair:
    """One run of ours and the peer's run next to it."""

    stage: int
    ours: Run
    peer: Run

    @property
    def ratio(self) -> float:
        """Targets per second, ours over the peer's."""
        return self.ours.tokens_per_second / self.peer.tokens_per_second

    @property
    def exposed(self) -> float:
        """The part of a step in which rank 0 waited for communication."""
        assert self.ours.wait_seconds is not None
        return self.ours.wait_seconds / self.ours.step_seconds


@dataclass(frozen=True)
class Verdict:
    """The medians of one stage. `reached` is None where nothing is asked of the model."""

    stage: int
    pairs: list[Pair]
    ratio: float
    exposed: float
    reached: bool | None

    def median(self, figure: Callable[[Pair], float]) -> float:
        """The median of a figure over the pairs."""
        return statistics.median(map(figure, self.pairs))

    def to_json(self) -> dict[str, Any]:
        """As written to the results file."""
        return {**asdict(self), "ratios": [p.ratio for p in self.pairs]}


def judge(pairs: list[Pair], *, demand: bool) -> Verdict:
    """The verdict on one stage's pairs; without `demand` only the figures."""
    stage = pairs[0].stage
    ratio = statistics.median(p.ratio for p in pairs)
    exposed = statistics.median(p.exposed for p in pairs)
    reached = ratio >= LEAST_RATIO[stage] and (stage < 3 or exposed < MOST_EXPOSED)
    return Verdict(stage, pairs, ratio, exposed, reached if demand else None)


def table(setting: Setting, verdicts: list[Verdict]) -> Table:
    """One line per stage."""
    tokens = setting.rows * setting.width
    shown = Table(title=f"{setting.model.name}, {setting.ranks} ranks, {tokens} tokens per rank and step")
    for heading in (
        "stage",
        "targets/s",
        "mlx-lm",
        "ratio",
        "of the pairs",
        "asked",
        "waited",
        "GiB",
        "mlx-lm",
    ):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("reached")
    for v in verdicts:
        ratios = [p.ratio for p in v.pairs]
        shown.add_row(
            str(v.stage),
            f"{v.median(lambda p: p.ours.tokens_per_second):.1f}",
            f"{v.median(lambda p: p.peer.tokens_per_second):.1f}",
            f"{v.ratio:.3f}",
            f"{min(ratios):.3f} - {max(ratios):.3f}",
            f"{LEAST_RATIO[v.stage]:.2f}",
            f"{v.exposed:.1%}",
            f"{v.median(lambda p: p.ours.peak_bytes / 2**30):.2f}",
            f"{v.median(lambda p: p.peer.peak_bytes / 2**30):.2f}",
            {True: "yes", False: "NO", None: "-"}[v.reached],
        )
    return shown
