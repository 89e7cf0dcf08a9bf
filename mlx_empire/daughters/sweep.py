"""Adapters by several settings over one base: each a step of the way, the best of them on, until few come to the end.

The base is read once for each comparison and kind of adapter, and stays while one setting after the other trains on
it. One that pauses is saved and goes on from there to the bits of a run that was never interrupted. Who goes on follows
from metrics.jsonl of each, so a sweep that was killed and is given again decides alike and repeats nothing.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlx_empire.checkpoint.manifest import Origin, config_digest, sampled_digest
from mlx_empire.comm.connect import connect
from mlx_empire.comm.failure import arm_faults, guard
from mlx_empire.comm.protocol import Communicator
from mlx_empire.daughters import machine, saved
from mlx_empire.daughters.jobs import Jobs, JobState, event
from mlx_empire.daughters.settings import Setting, divided, groups_of, rungs_of, settings_of
from mlx_empire.daughters.table import DaughterTable
from mlx_empire.disk import replace_private
from mlx_empire.errors import UnreadableError, UserError
from mlx_empire.evaluation.questions import files_of_set
from mlx_empire.formats.seal import bytes_and_digest
from mlx_empire.recipe.changes import changes, parse_stored
from mlx_empire.recipe.evaluation import HELD_OUT_LOSS, worse_by
from mlx_empire.recipe.load import dump_recipe, load_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.metrics import read_metrics
from mlx_empire.run.agree import share_nodes
from mlx_empire.run.apart import refuse_mixed
from mlx_empire.run.caffeinate import keep_awake
from mlx_empire.run.job import Job
from mlx_empire.run.launched import COMPLETE
from mlx_empire.run.lock import RunLock
from mlx_empire.run.resume import require_same
from mlx_empire.run.shared_rows import load_data
from mlx_empire.run.what_next import next_commands

FILE_NAME = "sweep.json"
SOME_FAILED = 65


@dataclass
class Tried:
    """A setting, its score at each comparison by step, and why it was left (empty: it was not)."""

    setting: Setting
    scores: dict[int, float] = field(default_factory=dict)
    left: str = ""


class SettingsAsJobs:
    """Settings as what `Daughters` trains: each has its recipe, and nothing is decided when one is done."""

    def __init__(self, settings: Sequence[Setting]) -> None:
        self._recipes = {one.name: one.recipe for one in settings}

    def of(self, name: str) -> Recipe:
        """The recipe of a setting."""
        return self._recipes[name]

    def begun(self, name: str, *, goes_on: bool) -> None:
        """Nothing is kept of a setting's rows."""

    def done(self, name: str) -> str:
        """Nothing is to be said."""
        return ""


def sweep_command(options: argparse.Namespace) -> int:
    """What the command line asks for; returns the exit code."""
    with guard(None):
        comm = connect()
    with guard(comm):
        if comm.size > 1:
            raise UserError("mpirun: a sweep is one machine's; give the command without it")
        arm_faults(0)
        keep_awake()
        changes, swept = divided(options.overrides)
        recipe = load_recipe(options.recipe, changes)
        settings = settings_of(recipe, swept)
        for one in settings:
            machine.refuse_unbuilt(one.recipe)
        if recipe.evaluation.fallback is not None:
            raise UserError(
                f"evaluation.fallback: {recipe.evaluation.fallback}: a sweep takes its best setting; leave it out"
            )
        refuse_mixed(recipe, comm.rank, comm.hostname)
        with RunLock(recipe.run.dir) as lock:
            if lock.note:
                print(lock.note)
            return Sweep(comm, recipe, settings, options).run()
    raise AssertionError("guard always leaves")


class Sweep:
    """One sweep: its comparisons, and what came of each setting."""

    def __init__(
        self, comm: Communicator, recipe: Recipe, settings: Sequence[Setting], options: argparse.Namespace
    ) -> None:
        """UserError where nothing would be compared."""
        self._recipe, self._settings = recipe, settings
        self._metric = _metric_of(recipe, options.by)
        splits = load_data(recipe, machine.single_target(recipe).spec)
        if splits.valid is None and self._metric == HELD_OUT_LOSS:
            raise UserError(
                f"{recipe.data.named}: nothing is held out to compare by; add a valid.jsonl, data.validation_split or "
                "evaluation.sets"
            )
        folder = recipe.model.path
        base, config = sampled_digest(folder), config_digest(folder)
        self._origin = Origin(dump_recipe(recipe), splits.digest, base, config)
        self._steps = Job.of(recipe, splits.train).steps
        self._rungs = rungs_of(len(settings), self._steps, options.keep)
        (self._node,) = share_nodes(comm, recipe, options.hosts)
        self._tried = [Tried(one) for one in settings]
        files = [file for one in recipe.evaluation.sets for file in files_of_set(one)]
        self._asked = {str(file): bytes_and_digest(file)["sha256"] for file in files if file.is_file()}

    def run(self) -> int:
        """Every comparison, then the table; the exit code."""
        self._refuse_another()
        self._write()
        jobs = Jobs({one.name: JobState(one.name) for one in self._settings})
        with DaughterTable(jobs) as update:

            def tell(name: str, **fields: Any) -> None:
                jobs.take(event(name, **fields))
                update()

            for step, go_on in self._rungs:
                self._train(step, tell)
                self._compare(step, go_on)
                self._write()
        self._show()
        return SOME_FAILED if any(one.left == FAILED_TO_TRAIN for one in self._tried) else 0

    @property
    def _going(self) -> list[Tried]:
        return [one for one in self._tried if not one.left]

    def _train(self, step: int, tell: Any) -> None:
        """Everybody who goes on, as far as `step`."""
        waiting = [one.setting for one in self._going if not self._is_there(one.setting, step)]
        for group in groups_of(waiting):
            recipe = group[0].recipe
            capacity = machine.capacity_for(recipe, self._node, 1)
            names = [one.name for one in group]
            pauses = dict.fromkeys(names, step) if step < self._steps else {}
            machine.train_adapters(recipe, SettingsAsJobs(group), names, self._node, capacity, tell, pauses)

    def _is_there(self, setting: Setting, step: int) -> bool:
        """Whether a setting has come so far already, and can go on from there or needs not."""
        folder = setting.recipe.run.dir
        if (folder / COMPLETE).exists():
            return True
        try:
            point = saved.resume_point_of(folder)
        except UnreadableError:
            raise
        except UserError:  # damaged: it begins anew, and says so
            point = None
        return (
            step < self._steps
            and point is not None
            and point.step >= step
            and self._score(folder, step) is not None
        )

    def _compare(self, step: int, go_on: int) -> None:
        """Note the scores at `step`; the best `go_on` go on."""
        going = self._going
        for one in going:
            score = self._score(one.setting.recipe.run.dir, step)
            if score is None or not math.isfinite(score):
                one.left = FAILED_TO_TRAIN
            else:
                one.scores[step] = score
        ranked = sorted((one for one in going if not one.left), key=lambda one: self._worse(one.scores[step]))
        for one in ranked[go_on:] if step < self._steps else ():
            one.left = f"stopped at step {step}"

    def _worse(self, score: float) -> float:
        """Larger for worse scores."""
        return score if worse_by(self._metric, 0.0, 1.0) > 0 else -score

    def _score(self, folder: Path, step: int) -> float | None:
        """What was measured after `step`, or at the end of one that met its gate before."""
        try:
            records = [r for r in read_metrics(folder) if "eval_loss" in r]
        except (OSError, UserError):
            return None
        complete = (folder / COMPLETE).exists()
        found = [r for r in records if r["step"] == step] or (records[-1:] if complete else [])
        if not found:
            return None
        last = found[-1]
        value = (
            last["eval_loss"] if self._metric == HELD_OUT_LOSS else last.get("scores", {}).get(self._metric)
        )
        return None if value is None else float(value)

    @property
    def _told_rungs(self) -> list[dict[str, int]]:
        return [{"step": step, "go_on": go_on} for step, go_on in self._rungs]

    def _refuse_another(self) -> None:
        """UserError where run.dir has a sweep of other settings, comparisons, questions, rows or weights: its scores
        would be told as those of this one.
        """
        path, told = self._recipe.run.dir / FILE_NAME, None
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            alike = before["rungs"] == self._told_rungs and {one["name"] for one in before["settings"]} == {
                one.name for one in self._settings
            }
            if "origin" in before:  # an earlier version noted none
                told = Origin(**before["origin"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError):
            alike = False
        if not alike:
            raise UserError(
                f"{path}: is of another sweep (settings, steps or --keep); choose another run.dir"
            )
        if told is not None:
            require_same(told, self._origin, str(path), anew="choose another run.dir")
            self._refuse_other_questions(parse_stored(told.recipe, str(path)), path)
            if "asked" in before:  # nor that
                self._refuse_other_files(before["asked"], path)

    def _refuse_other_files(self, before: Mapping[str, str], path: Path) -> None:
        """UserError where the sets' files are others, or hold other questions, or other code that scores answers, than
        the settings were compared by so far.
        """
        changed = [file for file in {**before, **self._asked} if before.get(file) != self._asked.get(file)]
        if changed and "evaluation.sets" not in self._recipe.run.accept_changes:
            what = "code" if changed[0].endswith(".py") else "questions"
            holds = (
                f"holds other {what} than" if changed[0] in self._asked else f"is gone, and held {what} that"
            )
            raise UserError(
                f"{path}: evaluation.sets: {changed[0]} {holds} settings were compared by; bring back what was "
                "there, add run.accept_changes=[evaluation.sets], or choose another run.dir"
            )

    def _refuse_other_questions(self, before: Recipe, path: Path) -> None:
        """UserError where other scores are asked for: they change no bit of an adapter, but who goes on."""
        for key in changes(before, self._recipe):
            if key.startswith("evaluation.") and key not in self._recipe.run.accept_changes:
                raise UserError(
                    f"{path}: {key}: settings were compared by another one; put the old value back, add "
                    f"run.accept_changes=[{key}], or choose another run.dir"
                )

    def _write(self) -> None:
        """`sweep.json` beside the settings' folders."""
        document = {
            "metric": self._metric,
            "origin": asdict(self._origin),
            "asked": self._asked,
            "rungs": self._told_rungs,
            "settings": [
                {
                    "name": one.setting.name,
                    "words": list(one.setting.words),
                    "scores": {str(step): score for step, score in one.scores.items()},
                    "left": one.left or None,
                }
                for one in self._tried
            ],
        }
        replace_private(self._recipe.run.dir / FILE_NAME, json.dumps(document, indent=1) + "\n")

    def _show(self) -> None:
        """One table, the best first, and what to do with it."""
        steps = [step for step, _ in self._rungs]
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
        table.add_column("setting", overflow="fold")
        for step in steps:
            table.add_column(f"{self._metric} at {step}", justify="right")
        table.add_column("what came of it")

        def order(one: Tried) -> tuple[int, float]:
            last = max(one.scores, default=0)
            return (-last, self._worse(one.scores[last]) if last else 0.0)

        ranked = sorted(self._tried, key=order)
        for one in ranked:
            cells = [f"{one.scores[step]:.4f}" if step in one.scores else "-" for step in steps]
            table.add_row(" ".join(one.setting.words), *cells, one.left or "came to the end")
        Console().print(table)
        if best := next((one for one in ranked if not one.left), None):
            print(f"the best: {best.setting.recipe.run.dir}", *next_commands(best.setting.recipe), sep="\n")


FAILED_TO_TRAIN = "failed"


def _metric_of(recipe: Recipe, asked: str | None) -> str:
    """What settings are compared by. UserError for what is not measured."""
    scores = recipe.evaluation.scores
    gate = recipe.evaluation.stop_when
    metric = asked or (gate.metric if gate is not None else next(iter(scores), HELD_OUT_LOSS))
    if metric not in (*scores, HELD_OUT_LOSS):
        raise UserError(f"--by: {metric}: is not measured; there are {', '.join((*scores, HELD_OUT_LOSS))}")
    return metric
