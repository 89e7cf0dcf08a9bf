"""What `list`, `compare` and `clean` print: tables on a terminal, and for `list` also JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_empire.comm.failure import guard
from mlx_empire.errors import UserError
from mlx_empire.report.text import duration, number
from mlx_empire.run.compare import differences, figures
from mlx_empire.run.overview import Overview, held_on_disk, look_at, read_folder, runs_in
from mlx_empire.run.status import date
from mlx_empire.runs.clean import Deletion, delete, deletions
from mlx_empire.sizes import amount

WIDE = 4000  # columns where nobody says how wide the output is: one line a row


def show_command(options: argparse.Namespace) -> int:
    """What the command line asks for; returns the exit code."""
    with guard(None):
        if options.verb == "list":
            return show_list(options.folder, options.json)
        if options.verb == "compare":
            return show_comparison(options.folders)
        return show_deletions(options.folders, options.yes)
    raise AssertionError("guard always leaves")


def show_list(folder: Path, as_json: bool) -> int:
    """The runs in `folder`, by name. UserError where that is no folder."""
    runs = found_in(folder)
    now = time.time()
    if as_json:
        print(json.dumps([_document(run, now) for run in runs], indent=1))
        return 0
    if not runs:
        print(f"{folder}: no run has been here; `mlx-empire train RECIPE` makes one")
        return 0
    table = _table("run", "state", "step", "loss", "held out", "ends", "on the disk")
    for run in runs:
        _add(table, str(run.folder), run.condition, *_cells(run, now), amount(held_on_disk(run.folder)))
    _print(table)
    return 0


def found_in(folder: Path) -> list[Overview]:
    """The runs in a folder. UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; say where the runs lie")
    return [run for path in runs_in(folder) if (run := read_folder(path)) is not None]


def show_comparison(folders: Sequence[Path]) -> int:
    """What differs in the recipes, then the runs' figures. UserError for a folder without a run."""
    runs = [look_at(folder) for folder in folders]
    names = [str(run.folder) for run in runs]
    table = _table("recipe", *names)
    for row in differences(runs):
        _add(table, *row)
    if table.row_count:
        _print(table)
    else:
        print("the recipes say the same, but for where the runs lie")
    print()
    table = _table("what came of it", *names)
    for row in figures(runs):
        _add(table, *row)
    _print(table)
    return 0


def show_deletions(folders: Sequence[Path], yes: bool) -> int:
    """What of the runs in `folders`, and of the token cache, may go; with `yes` it goes."""
    found = deletions([run for folder in folders for run in found_in(folder)])
    if not found:
        print("nothing to delete: only what finished runs do not need would go")
        return 0
    table = _table("what", "why it can go", "frees")
    for one in found:
        _add(table, str(one.path), one.why, amount(one.bytes))
    _print(table)
    if not yes:
        would = amount(sum(one.bytes for one in found))
        print(f"{would} in all. Nothing was deleted; the same command with --yes does it.")
        return 0
    tried = [(one, _try(one)) for one in found]
    problems = [problem for _, problem in tried if problem is not None]
    freed = sum(one.bytes for one, problem in tried if problem is None)
    for problem in problems:
        print(problem, file=sys.stderr)
    left = f", but for {len(problems)}" if problems else ""
    print(f"deleted{left}: {amount(freed)} in all")
    return UserError.exit_code if problems else 0


def _try(one: Deletion) -> str | None:
    try:
        delete(one)
    except OSError as error:
        return f"{one.path}: {error.strerror}"
    return None


def _cells(run: Overview, now: float) -> list[str]:
    loss = number(run.steps[-1]["loss"], ".4f") if run.steps else "-"
    held_out = f"{run.evaluations[-1]['eval_loss']:.4f}" if run.evaluations else "-"
    left = run.seconds_left
    return [
        run.progress,
        loss,
        held_out,
        "-" if left is None else f"{date(now + left)} (in {duration(left)})",
    ]


def _document(run: Overview, now: float) -> dict[str, Any]:
    left = run.seconds_left
    return {
        "folder": str(run.folder),
        "state": run.condition,
        "step": run.step,
        "steps": run.total,
        "loss": run.steps[-1]["loss"] if run.steps else None,
        "held_out_loss": run.evaluations[-1]["eval_loss"] if run.evaluations else None,
        "ends": None if left is None else now + left,
        "disk_bytes": held_on_disk(run.folder),
    }


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(Text(first), overflow="fold")
    for name in others:
        table.add_column(Text(name), overflow="fold")
    return table


def _add(table: Table, *cells: str) -> None:
    """A row of plain text: what stands in folders and recipes is no markup."""
    table.add_row(*(Text("".join(c if c.isprintable() else "?" for c in cell)) for cell in cells))


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)
