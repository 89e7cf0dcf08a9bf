"""The live table of many daughters: who is trained where, how far, and what was learnt."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mlx_empire.daughters.jobs import BEFORE, CHANGED, DONE, FAILED, LOST, TRAINING, WAITING, Jobs, JobState
from mlx_empire.report.text import duration, number, terminal_size

COLOURS = {
    DONE: "green",
    BEFORE: "dim green",
    TRAINING: "cyan",
    WAITING: "dim",
    FAILED: "bold red",
    CHANGED: "yellow",
    LOST: "red",
}
ORDER = (TRAINING, FAILED, LOST, CHANGED, DONE, BEFORE, WAITING)
REFRESHES = 4  # a second


class DaughterTable:
    """Shows a board while workers work: redrawn in place on a terminal, else a line for every new state or note."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        size = terminal_size(sys.stdout)
        self._console = Console(width=size.columns if size else 110, force_terminal=size is not None)
        self._live = (
            Live(
                get_renderable=lambda: self._table(self._rows_that_fit()),
                console=self._console,
                refresh_per_second=REFRESHES,
            )
            if size is not None
            else None
        )
        self._said: dict[str, tuple[str, str]] = {}

    def __enter__(self) -> Callable[[], None]:
        if self._live is not None:
            self._live.start()
        return self.update

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        self.update()
        self._console.print(self._table(len(self._jobs.states)))

    def update(self) -> None:
        """Say what is new where nothing is redrawn."""
        if self._live is not None:
            return
        for state in self._jobs.states.values():
            if self._said.get(state.name) != (state.state, state.note) and state.state != WAITING:
                note = f": {state.note}" if state.note else ""
                where = f" on {state.machine}" if state.machine != "-" else ""
                self._console.print(f"{state.name}: {state.state}{where}{note}", markup=False, soft_wrap=True)
            self._said[state.name] = (state.state, state.note)

    def message(self, text: str) -> None:
        """A worker's line that is about no daughter."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _rows_that_fit(self) -> int:
        return max(self._console.height - 6, 4)

    def _table(self, most: int) -> Table:
        states = sorted(self._jobs.states.values(), key=lambda s: (ORDER.index(s.state), s.name))
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
        table.caption, table.caption_justify = self._caption(), "left"
        for name in ("daughter", "machine", "state"):
            table.add_column(name, overflow="fold")
        for name in ("step", "held-out loss", "left"):
            table.add_column(name, justify="right", no_wrap=True)
        for state in states[:most]:
            table.add_row(*_row(state))
        if len(states) > most:
            table.add_row(f"and {len(states) - most} more", "", "", "", "", "")
        return table

    def _caption(self) -> str:
        states: Sequence[JobState] = list(self._jobs.states.values())
        counts = {name: sum(s.state == name for s in states) for name in ORDER}
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def _row(state: JobState) -> tuple[str | Text, ...]:
    left = state.left
    loss = number(state.held_out, ".4f") if state.held_out is not None else "-"
    if state.before is not None and state.held_out is not None and state.before != state.held_out:
        loss = f"{state.before:.4f} > {loss}"
    note = f" ({state.note})" if state.note else ""
    return (
        escape(state.name),
        escape(state.machine),
        Text(state.state + note, COLOURS[state.state]),
        f"{state.step}/{state.steps}" if state.steps else "-",
        loss,
        duration(left) if left is not None else "",
    )
