"""What `status` shows of a run: who supervises it, how far it is, what it lost and what it saved.

Reads only what the run left on this machine: launch.json, metrics.jsonl, recipe.yaml and the checkpoints' names.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_empire.errors import UserError
from mlx_empire.launch.run_folder import LaunchState, RunFolder, read_state, run_folder, supervised
from mlx_empire.recipe.load import load_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.metrics import FILE_NAME, read_metrics
from mlx_empire.report.text import duration

_RECENT = 20  # steps whose pace says how long the rest takes


def status_rows(folder: Path, now: float | None = None) -> list[tuple[str, str]]:
    """(name, value) rows. UserError for a folder without a run."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    state, recipe = read_state(folder), _recipe(folder)
    # Its recipe may name another run.dir: the folder may have been moved.
    elsewhere = recipe is not None and recipe.run.checkpoints is not None
    run = run_folder(recipe) if recipe is not None and elsewhere else RunFolder(folder)
    records = read_metrics(folder) if (folder / FILE_NAME).exists() else []
    if state is None and not records:
        raise UserError(f"{folder}: no run has been here")
    rows = [("run", _condition(state, supervised(folder), RunFolder(folder).complete))]
    if state is not None:
        rows += _launch_rows(state, now if now is not None else time.time())
    rows += _progress_rows(records, _total(recipe))
    committed = run.committed
    rows.append(("last checkpoint", "none" if committed is None else f"step {committed}"))
    return rows


def _condition(state: LaunchState | None, held: bool, complete: bool) -> str:
    if complete:
        return "complete"
    if state is None:
        return "started without mlx_empire.launch; whether it runs is not known"
    if held:
        return f"{state.said or 'starting'}, process {state.pid} on {state.host}"
    if state.code is None:
        return f"its launcher (process {state.pid} on {state.host}) is gone without a word"
    return f"ended: {state.said}, exit code {state.code}"


def _launch_rows(state: LaunchState, now: float) -> list[tuple[str, str]]:
    rows = [("machines", ", ".join(state.machines)), ("restarts", f"{state.restarts} of {state.budget}")]
    if state.code is None:
        rows.append(("started", f"{duration(max(now - state.started, 0))} ago"))
    if state.failures:
        last = state.failures[-1]
        who = " on ".join(
            str(w) for w in (f"rank {last['rank']}", last["host"]) if w not in (None, "rank None")
        )
        rows.append(("last failure", f"{who or 'the run'}: {last['cause']}, step {last['step']}"))
    if state.code not in (0, None):
        rows.append(("to go on", state.command))
    return rows


def _progress_rows(records: Sequence[Mapping[str, Any]], total: int | None) -> list[tuple[str, str]]:
    steps = [record for record in records if "eval_loss" not in record]
    if not steps:
        return [("step", "none yet")]
    last, recent = steps[-1], steps[-_RECENT:]
    rows = [("step", f"{last['step']}" if total is None else f"{last['step']} of {total}")]
    if last["loss"] is not None:
        rows.append(("loss", f"{last['loss']:.4f}"))
    rows.append(("targets/s", f"{last['tokens_per_second']:.0f}"))
    if total is not None:
        pace = sum(record["step_seconds"] for record in recent) / len(recent)
        rows.append(("time left", duration(max(total - last["step"], 0) * pace)))
    held_out = [record for record in records if "eval_loss" in record]
    if held_out and held_out[-1]["eval_loss"] is not None:
        rows.append(("held-out loss", f"{held_out[-1]['eval_loss']:.4f} after step {held_out[-1]['step']}"))
    return rows


def _recipe(folder: Path) -> Recipe | None:
    """The recipe as the run resolved it; None before it has."""
    try:
        return load_recipe(folder / "recipe.yaml")
    except UserError:
        return None


def _total(recipe: Recipe | None) -> int | None:
    """The run's length where the recipe gives it in steps."""
    return int(recipe.run.steps.value) if recipe is not None and recipe.run.steps.unit == "steps" else None
