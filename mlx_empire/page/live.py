"""What an open page is told: at first everything, then what is new, and everything again when a run went back.

A `Feed` is one reader's; its `news` is asked now and then. Messages are JSON:

    {"panels": {name: HTML}, "title": ...}       parts that have changed, with any of the following
    {"charts": [...]}                            all charts, thinned; what was drawn before goes
    {"more": {chart: {line: [[x ...], [y ...]]}}}  points that follow those that were sent
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from markupsafe import Markup

from mlx_empire.page.charts import Chart, charts_of
from mlx_empire.page.documents import RunDocument, run_document
from mlx_empire.page.render import run_panels
from mlx_empire.page.series import MOST_POINTS
from mlx_empire.page.watch import Look, WatchedRun

AT_FIRST = (
    1500  # points of a curve in the first message; once MOST_POINTS are reached all is sent thinned again
)
Message = dict[str, Any]


def screen(look: Look) -> tuple[RunDocument, dict[str, Markup]]:
    """What a run's page says as it is now, and its panels. Ask for it by `Look.once`."""
    run = run_document(look, time.time())
    return run, run_panels(run)


def _first(look: Look) -> list[dict[str, Any]]:
    """All charts, as they are sent to a page that opens."""
    return [chart.document(AT_FIRST) for chart in look.once(charts_of)]


class PanelFeed:
    """Tells of panels that have changed. `panels`: makes them all."""

    def __init__(self, panels: Callable[[], Mapping[str, Markup]]) -> None:
        self._panels = panels
        self._sent: dict[str, str] = {}

    def news(self) -> Message | None:
        """What has changed since the last call; None for nothing."""
        now = {name: str(html) for name, html in self._panels().items()}
        changed = {name: html for name, html in now.items() if self._sent.get(name) != html}
        self._sent = now
        return {"panels": changed} if changed else None


class RunFeed:
    """Tells one reader of one run."""

    def __init__(self, watched: WatchedRun) -> None:
        self._watched = watched
        self._panels = PanelFeed(lambda: self._now)
        self._now: dict[str, Markup] = {}
        self._look: Look | None = None
        self._shape: object = None
        self._sent: dict[tuple[str, str], int] = {}
        self._points: dict[tuple[str, str], int] = {}

    def news(self) -> Message | None:
        """What has changed since the last call; None for nothing. UserError, OSError as `WatchedRun.look`."""
        with self._watched.lock:
            look = self._watched.look()
            if look is None or look is self._look:
                return None
            self._look = look
            run, self._now = look.once(screen)
            message = self._panels.news() or {}
            if message:
                message |= {"title": f"{run.name}: {run.condition}", "mood": run.mood}
            charts = look.once(charts_of)
            shape = look.round, [(c.key, [line.name for line in c.lines], c.marks, c.bound) for c in charts]
            counts = {(c.key, line.name): len(line.curve) for c in charts for line in c.lines}
            most = max(
                (self._points.get(k, 0) + n - self._sent.get(k, 0) for k, n in counts.items()), default=0
            )
            if shape != self._shape or most > MOST_POINTS:
                message["charts"] = look.once(_first)
                self._points = {key: min(count, AT_FIRST) for key, count in counts.items()}
            elif counts != self._sent:
                message["more"] = {c.key: more for c in charts if (more := self._more(c))}
                self._points = {k: self._points[k] + n - self._sent[k] for k, n in counts.items()}
            self._shape, self._sent = shape, counts
            return message or None

    def _more(self, chart: Chart) -> dict[str, Any]:
        found = {}
        for line in chart.lines:
            start = self._sent[chart.key, line.name]
            if len(line.curve) > start:
                found[line.name] = line.curve.points(start)
        return found
