"""Many runs on one screen: the rows of the list, and the board of daughters that share a folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from mlx_empire.page.documents import mood_of
from mlx_empire.page.svg import sparkline
from mlx_empire.page.watch import Gallery, Look
from mlx_empire.report.text import duration
from mlx_empire.run.lock import RUN, is_held
from mlx_empire.run.overview import Overview
from mlx_empire.run.status import date


@dataclass(frozen=True)
class RunRow:
    """A run in the list; `done`, `loss`, `held_out`, `left` and `size` as numbers, to be sorted by."""

    name: str
    condition: str
    mood: str
    spark: Markup
    step: str
    done: int
    loss: float | None
    held_out: float | None
    left: float | None
    ends: str | None
    size: int


@dataclass(frozen=True)
class DaughterRow:
    """One line of a board. `name`: of the run, `title`: of the person."""

    name: str
    title: str
    state: str
    mood: str
    step: str
    spark: Markup
    before: str
    now: str


@dataclass(frozen=True)
class Board:
    """The daughters of one folder, in words how many stand how, and one by one."""

    name: str
    counts: str
    rows: Sequence[DaughterRow]


def run_rows(gallery: Gallery, now: float) -> list[RunRow]:
    """The runs in a folder, by name."""
    return [_row(run.size(), look, now) for run, look in gallery.looks()]


def boards(gallery: Gallery) -> list[Board]:
    """Folders in which daughters lie side by side, each with its daughters by name."""
    found: dict[Path, list[Look]] = defaultdict(list)
    for run, look in gallery.looks():
        if _is_daughter(look.overview):
            found[run.folder.parent].append(look)
    return [_board(folder, looks) for folder, looks in found.items()]


def _is_daughter(run: Overview) -> bool:
    """Whether it is one of many: an adapter whose data lie in a folder of its own name, as `daughters` deals them."""
    recipe = run.recipe
    path = None if recipe is None else recipe.data.path
    return (
        recipe is not None
        and recipe.tuning.type != "full"
        and path is not None
        and path.name == run.folder.name
    )


def _board(folder: Path, looks: Sequence[Look]) -> Board:
    at_work = is_held(folder, RUN)
    rows = [_daughter(look, at_work) for look in looks]
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[row.state] += 1
    counted = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    return Board(folder.absolute().name, ", ".join(f"{count} {state}" for state, count in counted), rows)


def _daughter(look: Look, at_work: bool) -> DaughterRow:
    run = look.overview
    state, mood = run.condition, mood_of(run)
    if at_work and not run.complete:
        state, mood = "training", "running"
    losses = [float(record["eval_loss"]) for record in run.evaluations]
    return DaughterRow(
        name=look.name,
        title=run.folder.name,
        state=state,
        mood=mood,
        step=run.progress,
        spark=look.once(_spark),
        before=f"{losses[0]:.4f}" if len(losses) > 1 else "–",
        now=f"{losses[-1]:.4f}" if losses else "–",
    )


def _row(size: int, look: Look, now: float) -> RunRow:
    run = look.overview
    left = run.seconds_left
    return RunRow(
        name=look.name,
        condition=run.condition,
        mood=mood_of(run),
        spark=look.once(_spark),
        step=run.progress,
        done=run.step,
        loss=run.steps[-1].get("loss") if run.steps else None,
        held_out=run.evaluations[-1]["eval_loss"] if run.evaluations else None,
        left=left,
        ends=None if left is None else f"{date(now + left)} (in {duration(left)})",
        size=size,
    )


def _spark(look: Look) -> Markup:
    curve = look.series.curves.get("smoothed")
    return sparkline(curve) if curve is not None else Markup("")


def named(gallery: Gallery, names: Sequence[str]) -> Iterator[Look]:
    """What the runs of these names say, without those that are not there."""
    for name in names:
        run = gallery.run(name)
        look = run.look() if run is not None else None
        if look is not None:
            yield look
