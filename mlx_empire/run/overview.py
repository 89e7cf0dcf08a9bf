"""What a run's folder tells of the run: how it stands, how far it is, what it learnt, what it keeps on the disk.

Everything is read from what the run left on this machine, without a lock and without MLX; nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_empire.errors import UserError
from mlx_empire.recipe.load import load_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.metrics import FILE_NAME, read_metrics
from mlx_empire.run.launched import COMPLETE, STATE, LaunchState, RunFolder, read_state, run_folder
from mlx_empire.run.lock import LAUNCHER, RUN, is_held
from mlx_empire.run.names import PLAN, RECIPE, plan_of

RECENT = 20  # steps whose pace says how long the rest takes
DEEPEST = 3  # levels of folders below the one in which runs are looked for


@dataclass(frozen=True)
class Overview:
    """A run as its folder tells it at one moment. `held`: a process of this machine holds the folder."""

    folder: Path
    recipe: Recipe | None
    launch: LaunchState | None
    records: tuple[dict[str, Any], ...]
    held: bool
    complete: bool

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The records of steps, in their order."""
        return [record for record in self.records if "eval_loss" not in record]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The records of evaluations with a held-out loss."""
        return [record for record in self.records if record.get("eval_loss") is not None]

    @property
    def step(self) -> int:
        """The last step; 0 before the first."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @cached_property
    def plan(self) -> dict[str, Any]:
        """What `plan.json` says; empty where there is none that can be read."""
        return plan_of(self.folder)

    @property
    def total(self) -> int | None:
        """How many steps the run has; None where nobody wrote that down."""
        planned = self.plan.get("steps")
        if isinstance(planned, int):
            return planned
        length = self.recipe.run.steps if self.recipe is not None else None
        return int(length.value) if length is not None and length.unit == "steps" else None

    @property
    def progress(self) -> str:
        """How far it is, such as 1,200 of 5,000 (steps)."""
        return f"{self.step:,}" if self.total is None else f"{self.step:,} of {self.total:,}"

    @property
    def pace(self) -> float | None:
        """Seconds that one of the last steps took, on average."""
        seconds = [float(record["step_seconds"]) for record in self.steps[-RECENT:]]
        return sum(seconds) / len(seconds) if seconds else None

    @property
    def seconds_left(self) -> float | None:
        """How long the steps that are left take; None where that is not known or the run does not go on."""
        if self.complete or not self.held or self.total is None or self.pace is None:
            return None
        return max(self.total - self.step, 0) * self.pace

    @cached_property
    def saved(self) -> dict[int, Path]:
        """The checkpoints that count, by step, ascending; where the recipe puts them elsewhere, there."""
        # Its recipe may name another run.dir: the folder may have been moved.
        elsewhere = self.recipe is not None and self.recipe.run.checkpoints is not None
        return (run_folder(self.recipe) if elsewhere and self.recipe else RunFolder(self.folder)).saved

    @property
    def committed(self) -> int | None:
        """The step of the newest checkpoint that counts."""
        return max(self.saved, default=None)

    @property
    def condition(self) -> str:
        """How it stands, in a few words."""
        if self.complete:
            return "complete"
        if self.held:
            return self.launch.said or "starting" if self.launch is not None else "running"
        if self.launch is None:
            return "not finished"
        return "lost" if self.launch.code is None else f"ended: {self.launch.said}"


def look_at(folder: Path) -> Overview:
    """What a run's folder tells. UserError for a folder without a run."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    found = read_folder(folder)
    if found is None:
        raise UserError(f"{folder}: no run has been here")
    return found


class RecipeFile:
    """The recipe as a run resolved it, read once for each state of its file: who watches runs asks again and again."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / RECIPE
        self._stamp: object = None
        self._found: Recipe | None = None

    def read(self) -> Recipe | None:
        """The recipe; None before there is one, and for one that cannot be read."""
        try:
            about = self._path.stat()
            stamp = about.st_ino, about.st_size, about.st_mtime_ns
            if stamp != self._stamp:
                self._stamp, self._found = stamp, None
                self._found = load_recipe(self._path)
        except (OSError, UserError):
            return None
        return self._found


def read_folder(
    folder: Path, records: Sequence[dict[str, Any]] | None = None, recipe: RecipeFile | None = None
) -> Overview | None:
    """What a run's folder tells; None where no run has been. UserError for a launch.json that cannot be understood.

    records: those of metrics.jsonl, for who has read them already; the last RECENT steps and all evaluations will do.
    recipe: the folder's, for who asks again and again.
    """
    launch = read_state(folder)
    if records is None:
        records = read_metrics(folder) if (folder / FILE_NAME).exists() else ()
    complete = (folder / COMPLETE).exists()
    if launch is None and not records and not complete and not (folder / PLAN).exists():
        return None
    held = is_held(folder, RUN) or is_held(folder, LAUNCHER)
    return Overview(folder, (recipe or RecipeFile(folder)).read(), launch, tuple(records), held, complete)


def runs_in(folder: Path) -> list[Path]:
    """The folders of runs in `folder`, itself included, by name; links are not followed."""
    found = []
    for path, names, files in os.walk(folder):
        here = Path(path)
        deep = len(here.relative_to(folder).parts) >= DEEPEST
        if {FILE_NAME, PLAN, STATE, COMPLETE} & set(files):
            found.append(here)
        names[:] = [] if deep else sorted(name for name in names if not name.startswith("."))
        names[:] = [name for name in names if name not in ("final", "checkpoints", "tensorboard")]
    return found


def held_on_disk(folder: Path) -> int:
    """The bytes on the disk of everything in a folder; links count as themselves."""
    return sum(_blocks(path) for path in _everything(folder))


def _everything(folder: Path) -> Iterator[Path]:
    for path, names, files in os.walk(folder):
        yield from (Path(path) / name for name in (*names, *files))


def _blocks(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except OSError:  # gone meanwhile
        return 0
