"""What each screen says, as plain values: a run's parts one by one, a row of the list of runs, the board of people.

Templates print these and decide nothing. All of it comes from the run's folder; what a folder lacks is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_empire.checkpoint.paths import PIN
from mlx_empire.page.charts import CAUSES
from mlx_empire.page.samples import Sample, samples_of
from mlx_empire.page.watch import Look
from mlx_empire.recipe.explain import leaf_fields
from mlx_empire.recipe.load import written
from mlx_empire.report.text import duration, fraction, span
from mlx_empire.run.overview import RECENT, Overview
from mlx_empire.run.status import condition_sentence, date, failure_sentence, last_lines, quiet_sentence
from mlx_empire.run.what_next import capacity_command, next_commands
from mlx_empire.sizes import amount

LOG_LINES = 14
# How a run stands, as a role of colour: green only for what is well and over.
MOODS = {"complete": "fits", "running": "running", "failed": "no", "idle": "none"}
COLOURS = ("activations", "optimizer", "logits", "gradients", "other")  # of what a step waits for


@dataclass(frozen=True)
class Figure:
    """One number with the words below it."""

    value: str
    name: str


@dataclass(frozen=True)
class Tick:
    """A place on the bar of a run's progress: a part of it (0 to 1), and what is there."""

    part: float
    text: str


@dataclass(frozen=True)
class MachineRow:
    """A rank's machine: sizes in bytes beside each other, what it does, and what it says of the wire."""

    name: str
    about: str
    memory: int
    limit: int
    planned: int
    peak: int | None
    says: tuple[str, ...]
    slow: bool = False

    @property
    def label(self) -> str:
        """The bar in words."""
        used = "nothing measured yet" if self.peak is None else f"{amount(self.peak)} used"
        return f"{self.name}: {used}, {amount(self.planned)} planned, limit {amount(self.limit)}"

    @property
    def colour(self) -> str:
        """Of what is used: a warning where that is more than was planned or may be."""
        used = self.peak or 0
        return "no" if used > self.limit else "tight" if used > self.planned else "weights"


@dataclass(frozen=True)
class Share:
    """A part of a step's seconds."""

    name: str
    seconds: float
    part: float
    colour: str


@dataclass(frozen=True)
class RunDocument:
    """One run, as its page says it."""

    name: str
    folder: str
    condition: str
    sentence: str
    mood: str
    quiet: str | None
    figures: Sequence[Figure]
    done: float | None
    ticks: Sequence[Tick]
    machines: Sequence[MachineRow]
    scale: int
    shares: Sequence[Share]
    planned_step: str | None
    failures: Sequence[tuple[str, str, str]]
    checkpoints: Sequence[str]
    restarts: str | None
    command: str | None
    coming: Sequence[str]
    plan_command: str
    log: Sequence[str]
    samples: Sequence[Sample]
    recipe: Sequence[tuple[str, str]]
    ledger: MemoryTable


@dataclass(frozen=True)
class MemoryTable:
    """Planned against measured. peaks: by rank its name, the run's peak, the plan's, and the one as a part of the
    other; rows: what the plan's consist of, by rank."""

    peaks: Sequence[tuple[str, str, str, str]] = ()
    rows: Sequence[tuple[str, Sequence[str]]] = ()


def run_document(look: Look, now: float) -> RunDocument:
    """What a run's page says; `now` in seconds since 1970."""
    run, launch = look.overview, look.overview.launch
    machines = list(_machines(run))
    return RunDocument(
        name=look.name,
        folder=str(run.folder),
        condition=run.condition,
        sentence=condition_sentence(run),
        mood=mood_of(run),
        quiet=quiet_sentence(run, now),
        figures=list(_figures(look, now)),
        done=None if not run.total else min(run.step / run.total, 1.0),
        ticks=list(_ticks(run)),
        machines=machines,
        scale=max((max(m.memory, m.limit, m.planned, m.peak or 0) for m in machines), default=1),
        shares=list(_shares(look)),
        planned_step=_planned_step(run),
        failures=[
            (date(one["time"]), failure_sentence(one), f"{one['phase'] or '?'}, step {one['step']}")
            for one in reversed(launch.failures if launch is not None else [])
        ],
        checkpoints=list(_checkpoints(run)),
        restarts=None if launch is None else f"{launch.restarts} of {launch.budget}",
        command=launch.command if launch is not None and launch.code not in (0, None) else None,
        coming=next_commands(run.recipe) if run.complete and run.recipe is not None else [],
        plan_command=capacity_command(
            run.folder, len(machines), None if run.recipe is None else run.recipe.run.hosts
        ),
        log=last_lines(run.folder, LOG_LINES),
        samples=samples_of(run),
        recipe=list(_recipe(run)),
        ledger=_ledger(run),
    )


def mood_of(run: Overview) -> str:
    """The role of the colour in which a run's state is shown."""
    if run.complete:
        return MOODS["complete"]
    if run.held:
        return MOODS["running"]
    lost = run.launch is not None and run.launch.code not in (0, 143)
    return MOODS["failed" if lost else "idle"]


def _figures(look: Look, now: float) -> Iterator[Figure]:
    run, series = look.overview, look.series
    yield Figure(run.progress, "step")
    if run.steps:
        smoothed = series.curves.get("smoothed")
        yield Figure(f"{smoothed.y[-1]:.4f}" if smoothed else "nan", "loss, smoothed")
    if run.evaluations:
        last = run.evaluations[-1]
        yield Figure(f"{last['eval_loss']:.4f}", f"held out, after step {last['step']:,}")
    if run.seconds_left is not None:
        yield Figure(date(now + run.seconds_left), f"ends, in {duration(run.seconds_left)}")
    if run.pace is not None:
        yield Figure(_seconds(run.pace), f"a step, mean of {min(len(run.steps), RECENT)}")
    if run.steps and isinstance(speed := run.steps[-1].get("positions_per_second"), int | float):
        yield Figure(f"{speed:,.0f}", "positions per second")
    if not run.held and series.seconds:
        yield Figure(duration(series.seconds), f"for {series.steps:,} steps")
    yield Figure("none" if run.committed is None else f"step {run.committed:,}", "last checkpoint")


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 100 else duration(value)


def _ticks(run: Overview) -> Iterator[Tick]:
    if run.total:
        for step in run.saved:
            yield Tick(min(step / run.total, 1.0), f"checkpoint of step {step:,}")


def _checkpoints(run: Overview) -> Iterator[str]:
    for step, path in reversed(run.saved.items()):
        yield f"step {step:,}{f' (kept: {PIN})' if (path / PIN).exists() else ''}"


def _machines(run: Overview) -> Iterator[MachineRow]:
    """One row a rank, of what the plan and the last step say; none where they do not speak of the same ranks."""
    last = run.steps[-1] if run.steps else {}
    waits = _floats(last.get("wait_seconds"))
    slowest = min(range(len(waits)), key=waits.__getitem__, default=-1) if _uneven(waits, last) else -1
    for rank, one in enumerate(_ranks(run)):
        node = one["node"]
        peaks, sent = _floats(last.get("peak_bytes")), _floats(last.get("bytes_sent"))
        says = []
        if len(waits) > 1 and rank < len(sent) and last.get("step_seconds"):
            says.append(f"{amount(sent[rank] / last['step_seconds'])}/s sent, waited {waits[rank]:.3g} s")
        place = (
            run.launch.places.get(str(rank))
            if run.launch is not None and run.held and not run.complete
            else None
        )
        about = [node.get("role") or f"rank {rank}", *([f"{place[0]}, step {place[1]}"] if place else [])]
        yield MachineRow(
            str(node["name"]),
            " · ".join(about),
            int(node.get("memory_bytes") or one["limit_bytes"]),
            int(one["limit_bytes"]),
            int(one["peak_bytes"]),
            int(peaks[rank]) if rank < len(peaks) else None,
            tuple(says),
            slow=rank == slowest,
        )


def _uneven(waits: Sequence[float], last: Mapping[str, Any]) -> bool:
    """Whether one rank keeps the others waiting: they wait for a twentieth of the step longer than it does."""
    return len(waits) > 1 and max(waits) - min(waits) > 0.05 * float(last.get("step_seconds") or 0)


def _ranks(run: Overview) -> list[dict[str, Any]]:
    """The ranks of plan.json that say what a row needs."""
    ranks = run.plan.get("ranks")
    needed = {"node", "limit_bytes", "peak_bytes"}
    if not isinstance(ranks, list) or not all(
        isinstance(one, dict) and needed <= one.keys() for one in ranks
    ):
        return []
    return [one for one in ranks if isinstance(one["node"], dict) and "name" in one["node"]]


def _floats(value: Any) -> list[float]:
    if not isinstance(value, list) or not all(isinstance(one, int | float) for one in value):
        return []
    return [float(one) for one in value]


def _shares(look: Look) -> Iterator[Share]:
    """Where the seconds of the last steps went: computing, and waiting by cause."""
    steps = [r for r in look.series.recent if isinstance(r.get("waited_for"), dict) and r.get("step_seconds")]
    if not steps:
        return
    total = sum(float(r["step_seconds"]) for r in steps)
    causes: dict[str, float] = {}
    for record in steps:
        for cause, seconds in record["waited_for"].items():
            causes[cause] = causes.get(cause, 0.0) + float(seconds)
    computing = max(total - sum(causes.values()), 0.0)
    yield Share("computing", computing / len(steps), computing / total, "weights")
    for place, (cause, seconds) in enumerate((c, s) for c, s in causes.items() if s > 0):
        yield Share(
            f"waiting for {CAUSES.get(cause, cause)}",
            seconds / len(steps),
            seconds / total,
            COLOURS[place % len(COLOURS)],
        )


def _planned_step(run: Overview) -> str | None:
    """The plan's seconds a step beside those that were measured."""
    planned = _floats(run.plan.get("step_seconds"))
    if len(planned) != 2 or run.pace is None:
        return None
    return f"planned for these chips {span(planned, ' s')}, measured {_seconds(run.pace)}"


def _recipe(run: Overview) -> Iterator[tuple[str, str]]:
    """The keys that the recipe sets to something else than their default."""
    if run.recipe is None:
        return
    for key, info in leaf_fields().items():
        section, name = key.split(".")
        value = getattr(getattr(run.recipe, section), name)
        if info.is_required() or value != info.get_default(call_default_factory=True):
            yield key, written(value)


def _ledger(run: Overview) -> MemoryTable:
    ranks = _ranks(run)
    peaks = _floats(run.steps[-1].get("peak_bytes")) if run.steps else []
    if not ranks or len(peaks) != len(ranks):
        return MemoryTable()
    names = {name: None for one in ranks for name, size in one.get("ledger", {}).items() if size}
    return MemoryTable(
        peaks=[
            (
                str(one["node"]["name"]),
                amount(peak),
                amount(one["peak_bytes"]),
                f"{fraction(peak, one['peak_bytes']):.0%}",
            )
            for peak, one in zip(peaks, ranks, strict=True)
        ],
        rows=[(name, [amount(one.get("ledger", {}).get(name, 0)) for one in ranks]) for name in names],
    )
