"""Decides how a run looks on rank 0's terminal: the plan's verdict node by node, then live progress.

Where a person watches a terminal, the progress is redrawn in place; elsewhere (a file, a pipe, a job's log)
each step is one plain line. The header is the same in both. Work before the header says what it is when it is slow.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlx_empire.plan.lengths import Every
from mlx_empire.progress import Passing
from mlx_empire.report.text import NodeRow, bar, duration, fraction, level, number, terminal_size
from mlx_empire.sizes import amount

PLAIN_WIDTH = 110
BAR_WIDTH = 12
WIDTHS = {
    "loss": 7,
    "eval loss": 7,
    "grad norm": 6,
    "targets/s": 8,
    "learnt": 4,
}  # so that live figures stand still
REDRAWS_PER_SECOND = 2
PATIENCE_SECONDS = 2.0
print_line = partial(print, flush=True)


@contextmanager
def said_if_slow(
    text: str, seconds: float = PATIENCE_SECONDS, say: Callable[[str], None] = print_line
) -> Iterator[None]:
    """Around work that shows nothing by itself: `text` is printed once it has taken so long."""
    timer = threading.Timer(seconds, say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class RunDisplay:
    """The display of one run, on rank 0 alone.

    `total_steps`: the step at which the run ends. `nodes`: one row a rank. `title_rows`: what stands above
    the table, as (name, value): model, parameters, ranks, stage. `mode`: `always` redraws in place, `never`
    writes plain lines, `auto` looks where the output goes. `log_every`: how often there is a plain line (None: after
    every step; the first and the last step have one anyway). Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        total_steps: int,
        nodes: Sequence[NodeRow],
        title_rows: Sequence[tuple[str, str]] = (),
        mode: Literal["auto", "always", "never"] = "auto",
        log_every: Every | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self.status: Callable[[], str | None] = lambda: None  # what else is going on, for the live display
        self._total = total_steps
        self._log_every = log_every or Every(1)
        self._printed: float | None = None  # when the last plain line of a step was
        self._nodes = list(nodes)
        self._clock = _Clock(total_steps)
        self._record: Mapping[str, Any] = {}
        self._evaluation: Mapping[str, Any] = {}
        self._passing = ""
        self._console, live = _console(stream or sys.stdout, mode)
        self._print_header(title_rows)
        self._live: Live | None = None
        if live:
            self._live = Live(
                self._progress(),
                console=self._console,
                refresh_per_second=REDRAWS_PER_SECOND,
                get_renderable=self._progress,
            )
            self._live.start()
            # A rank that dies takes this one with it at once: nobody would bring a hidden cursor back.
            self._console.show_cursor(True)

    @property
    def is_live(self) -> bool:
        """Whether progress is redrawn in place."""
        return self._live is not None

    def step(self, record: Mapping[str, Any]) -> None:
        """Show a finished step; `record` has the fields of `metrics.STEP_FIELDS`."""
        self._record = record
        self._clock.tick(record["step"], record["step_seconds"])
        if self._live is None and self._worth_a_line(record["step"]):
            self._printed = time.monotonic()
            self._print_line(self._step_line())

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Show an evaluation; `record` has `step` and `eval_loss`."""
        before, self._evaluation = self._evaluation, record
        if self._live is None:
            earlier = dict(_evaluated(before)) if before else {}
            figures = [
                f"{name} {value}" + (f"  (was {earlier[name]})" if name in earlier else "")
                for name, value in _evaluated(record)
            ]
            self._print_line("  ".join([self._step_of(record), *figures]))

    def message(self, text: str) -> None:
        """Print one remark above the progress, such as a request to stop.

        Where progress is redrawn, a passing one, such as a checkpoint saved, stands below it until the next one comes.
        """
        if self._live is not None and isinstance(text, Passing):
            self._passing = text
        else:
            self._print_line(text)

    def close(self, summary: Mapping[str, object] | None = None) -> None:
        """End the display and print `summary`, one row an entry. Calling it again prints nothing more."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            if self._passing:
                self._print_line(self._passing)
        if summary:
            self._console.print(_pairs([(name, str(value)) for name, value in summary.items()]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _worth_a_line(self, step: int) -> bool:
        if self._printed is None or step >= self._total:
            return True
        return self._log_every.due(step, time.monotonic() - self._printed)

    def _print_line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _print_header(self, title_rows: Sequence[tuple[str, str]]) -> None:
        if title_rows:
            self._console.print(_pairs(title_rows))
        if not self._nodes:
            return
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
        table.add_column("#")
        table.add_column("node", overflow="fold")
        table.add_column("role")
        for name in ("share", "peak", "limit"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("of its limit", no_wrap=True)
        table.add_column("fits", no_wrap=True)
        for rank, node in enumerate(self._nodes):
            verdict = Text("yes", "green") if node.fits else Text("NO", "bold red")
            peak, limit = amount(node.predicted_peak_bytes), amount(node.limit_bytes)
            used = self._memory_bar(fraction(node.predicted_peak_bytes, node.limit_bytes))
            name, role = escape(node.name), escape(node.role)
            table.add_row(str(rank), name, role, f"{node.share:.1%}", peak, limit, used, verdict)
        self._console.print(table)
        self._console.print()

    def _step_of(self, record: Mapping[str, Any]) -> str:
        return f"step {record['step']:>{len(str(self._total))}}/{self._total}"

    def _memory_bar(self, part: float) -> Text:
        ascii_only = self._console.options.ascii_only
        blocks = ("#", ".") if ascii_only else ("█", "░")
        percent = f"{part:>4.0%}" if part < 10 else ">10x"
        return Text.assemble((bar(part, BAR_WIDTH, blocks), level(part)), f" {percent}")

    def _figures(self) -> list[tuple[str, str]]:
        """The figures of the last step and evaluation, by name."""
        record = self._record
        figures = [
            ("loss", number(record["loss"], ".4f")),
            ("lr", number(record["learning_rate"], ".2e")),
            ("grad norm", number(record["grad_norm"], ".3g")),
            ("targets/s", number(record["tokens_per_second"], ",.0f")),
        ]
        if record.get("positions"):
            figures.append(("learnt", f"{record['tokens'] / record['positions']:.0%}"))
        if self._evaluation:
            figures[1:1] = _evaluated(self._evaluation)
        return figures

    def _step_line(self) -> str:
        """The plain line of the last step; of the ranks' memory it names the one nearest its limit."""
        held_out = dict(_evaluated(self._evaluation))
        figures = [f"{name} {value}" for name, value in self._figures() if name not in held_out]
        peaks = list(zip(self._nodes, self._record["peak_bytes"], self._cached(), strict=False))
        if peaks:
            node, peak, cached = max(peaks, key=lambda one: fraction(one[1], one[0].limit_bytes))
            figures.append(f"memory {fraction(peak, node.limit_bytes):.0%} ({node.name}{cached})")
        figures.append(f"left {duration(self._clock.seconds_left())}")
        return "  ".join([self._step_of(self._record), *figures])

    def _progress(self) -> RenderableType:
        """What the live display draws: progress, figures, and the memory of every rank against its limit."""
        done = self._record.get("step", 0)
        line = Table.grid(padding=(0, 2))
        line.add_row(
            f"step {done}/{self._total}",
            ProgressBar(total=self._total, completed=done, width=3 * BAR_WIDTH),
            f"{duration(self._clock.elapsed())} so far",
            f"{duration(self._clock.seconds_left())} left" if done else "",
        )
        status = Text(self.status() or self._passing, "dim")
        if not self._record:
            return Group(line, Text("waiting for the first step", "dim"), status)
        figures = Text("  ").join(
            Text.assemble((f"{name} ", "dim"), (value.rjust(WIDTHS.get(name, 0)), "bold"))
            for name, value in self._figures()
        )
        return Group(line, figures, self._memory_table(), *([status] if status.plain else []))

    def _cached(self) -> list[str]:
        """By rank, what MLX keeps of freed memory besides, in words; nothing where it keeps nothing."""
        sizes = self._record.get("cache_bytes") or [0] * len(self._nodes)
        return [f", {amount(size)} cached" if size else "" for size in sizes]

    def _memory_table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        peaks = zip(self._nodes, self._record["peak_bytes"], self._cached(), strict=False)
        for rank, (node, peak, cached) in enumerate(peaks):
            used = self._memory_bar(fraction(peak, node.limit_bytes))
            sizes = f"{amount(peak)} of {amount(node.limit_bytes)}{cached}"
            table.add_row(Text(str(rank), "dim"), escape(node.name), used, sizes)
        return table


def _evaluated(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of an evaluation by name: the held-out loss where there is one, and every score."""
    scores = [(name, number(value, ".4f")) for name, value in record.get("scores", {}).items()]
    if record.get("eval_loss") is None:
        return scores
    return [("eval loss", number(record["eval_loss"], ".4f")), *scores]


class _Clock:
    """Time so far and time left; the pace is that of the steps seen, saving and evaluating included."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._start = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._last = (0, self._start)
        self._pace = 0.0

    def tick(self, step: int, step_seconds: float) -> None:
        """A step has ended now. The first is slower than the others: it sets the pace until the second."""
        self._last = (step, time.monotonic())
        if self._first is None:
            self._first, self._pace = self._last, step_seconds
        elif step > self._first[0]:
            self._pace = (self._last[1] - self._first[1]) / (step - self._first[0])

    def elapsed(self) -> float:
        """Seconds since the display began."""
        return time.monotonic() - self._start

    def seconds_left(self) -> float:
        """Seconds until the last step at the pace so far, which the first step sets."""
        since = time.monotonic() - self._last[1]
        return max(0.0, (self._total - self._last[0]) * self._pace - since)


def _console(stream: TextIO, mode: str) -> tuple[Console, bool]:
    """A rich console on `stream`, and whether to redraw in place.

    What rich finds out holds for the descriptor, which is not the terminal under mpirun: `terminal_size`.
    """
    size = terminal_size(stream)
    if mode == "always" or (mode == "auto" and size is not None):
        width, height = size or (PLAIN_WIDTH, 40)
        return Console(file=stream, force_terminal=True, width=width, height=height), True
    width = size.columns if size is not None else PLAIN_WIDTH
    return Console(file=stream, force_terminal=size is not None, width=width), False


def _pairs(rows: Sequence[tuple[str, str]]) -> Table:
    """Names and values in two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    return table
