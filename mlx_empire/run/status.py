"""What `status` shows of a run on one screen: who supervises it, how far it is and when it ends, what it lost, what it
holds in memory and on the disk, and the last lines that it said.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_empire.progress import stalled_after
from mlx_empire.report.text import duration
from mlx_empire.run.launched import LOG, LaunchState
from mlx_empire.run.overview import Overview, held_on_disk, look_at
from mlx_empire.sizes import amount

LAST_LINES, _TAIL_BYTES = 5, 16 << 10

Row = tuple[str, str]


def status_rows(folder: Path, now: float | None = None) -> list[Row]:
    """(name, value) rows. UserError for a folder without a run."""
    run = look_at(folder)
    now = time.time() if now is None else now
    rows = [("run", condition_sentence(run))]
    if run.launch is not None:
        rows += _launch_rows(run.launch, now)
    rows += _progress_rows(run, now)
    rows += _memory_rows(run)
    rows.append(("last checkpoint", "none" if run.committed is None else f"step {run.committed:,}"))
    rows.append(("on the disk", amount(held_on_disk(folder))))
    said = last_lines(folder)
    return [*rows, *([("last lines", "\n".join(said))] if said else [])]


def date(seconds: float) -> str:
    """A moment (seconds since 1970) by this machine's clock, such as Thu 4 Dec 15:20."""
    moment = datetime.fromtimestamp(seconds)
    return f"{moment:%a} {moment.day} {moment:%b %H:%M}"


def condition_sentence(run: Overview) -> str:
    """How a run stands, and who supervises it."""
    state = run.launch
    if run.complete:
        return "complete"
    if state is None:
        if run.held:
            return "running, started without mlx-empire launch"
        return "started without mlx-empire launch; no process of this machine is at work"
    if run.held:
        return f"{state.said or 'starting'}, process {state.pid} on {state.host}"
    if state.code is None:
        return f"its launcher (process {state.pid} on {state.host}) is gone without a word"
    return f"ended: {state.said}, exit code {state.code}"


def _launch_rows(state: LaunchState, now: float) -> list[Row]:
    rows = [("machines", ", ".join(state.machines)), ("restarts", f"{state.restarts} of {state.budget}")]
    if state.code is None:
        rows.append(("started", f"{duration(max(now - state.started, 0))} ago"))
    if state.failures:
        last = state.failures[-1]
        rows.append(("last failure", f"{failure_sentence(last)}, step {last['step']}"))
    if state.code not in (0, None):
        rows.append(("to go on", state.command))
    return rows


def failure_sentence(failure: Mapping[str, Any]) -> str:
    """Who failed and why, of an entry of `LaunchState.failures`."""
    named = (f"rank {failure['rank']}", failure["host"])
    who = " on ".join(str(word) for word in named if word not in (None, "rank None"))
    return f"{who or 'the run'}: {failure['cause']}"


def _progress_rows(run: Overview, now: float) -> Iterator[Row]:
    if not run.steps:
        yield "step", "none yet" if run.total is None else f"none of {run.total:,} yet"
        return
    last = run.steps[-1]
    yield "step", run.progress
    if last["loss"] is not None:
        yield "loss", f"{last['loss']:.4f}"
    if run.evaluations:
        held_out = run.evaluations[-1]
        yield "held-out loss", f"{held_out['eval_loss']:.4f} after step {held_out['step']}"
    yield "targets/s", f"{last['tokens_per_second']:.0f}"
    if run.seconds_left is not None:
        yield "time left", duration(run.seconds_left)
        yield "ends", f"about {date(now + run.seconds_left)}"
    if (silent := quiet_sentence(run, now)) is not None:
        yield "quiet", silent


def quiet_sentence(run: Overview, now: float) -> str | None:
    """That no step has ended for long, where that is so."""
    last = run.steps[-1] if run.steps else {}
    if not run.held or run.pace is None or not isinstance(last.get("time"), int | float):
        return None
    silent = now - last["time"]
    if silent < stalled_after(run.pace):
        return None
    return f"no step has ended for {duration(silent)}; one takes {duration(run.pace)}"


def _memory_rows(run: Overview) -> Iterator[Row]:
    """Each rank's peak so far, beside the plan's and its limit."""
    peaks = run.steps[-1].get("peak_bytes") if run.steps else None
    ranks = run.plan.get("ranks")
    if not isinstance(peaks, list) or not isinstance(ranks, list) or len(ranks) != len(peaks):
        return
    told = [
        f"{one['node']['name']} {amount(peak)} (plan {amount(one['peak_bytes'])}, limit {amount(one['limit_bytes'])})"
        for peak, one in zip(peaks, ranks, strict=True)
    ]
    yield "memory", "\n".join(told)


def last_lines(folder: Path, most: int = LAST_LINES) -> list[str]:
    """The end of a detached run's output, at most `most` lines of it."""
    try:
        with (folder / LOG).open("rb") as file:
            file.seek(max(file.seek(0, 2) - _TAIL_BYTES, 0))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return ["".join(c if c.isprintable() else " " for c in line) for line in lines if line][-most:]
