"""The screens as HTML: jinja2's templates, which escape whatever comes from a recipe, a hostfile or data.

A screen is made of panels. The live page replaces those that have changed; the saved one is the same templates with
charts as SVG.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mlx_empire import __version__
from mlx_empire.page.board import Board, RunRow
from mlx_empire.page.charts import Chart
from mlx_empire.page.documents import RunDocument
from mlx_empire.page.samples import Sample
from mlx_empire.page.svg import chart_svg
from mlx_empire.report.html import STYLE
from mlx_empire.report.text import times_signs
from mlx_empire.run.status import date
from mlx_empire.sizes import amount

HERE = Path(__file__).parent
PANELS = ("head", "machines", "time", "story", "samples", "capacity", "recipe", "log")


@cache
def templates(*others: Path) -> Environment:
    """The templates, with what they may call; `others`: folders with more of them."""
    made = Environment(
        loader=FileSystemLoader([HERE / "templates", *others]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"amount": amount, "path": quote, "times": times_signs}
    made.globals |= {"percent": _percent, "chart_svg": chart_svg, "version": __version__}
    return made


def style() -> str:
    """The style sheet: that of all our pages, then what these have besides."""
    return STYLE + (HERE / "static" / "page.css").read_text(encoding="utf-8")


def run_panels(run: RunDocument) -> dict[str, Markup]:
    """The parts of a run's screen by name; empty where there is nothing to say."""
    return {name: _panel(name, run=run, samples=run.samples) for name in PANELS}


def samples_panel(samples: Sequence[Sample]) -> Markup:
    """Held-out rows as they are read."""
    return _panel("samples", samples=samples)


def runs_panels(runs: Sequence[RunRow]) -> dict[str, Markup]:
    """The parts of the list of runs."""
    return {"runs": _panel("runs", runs=runs)}


def people_panels(boards: Sequence[Board]) -> dict[str, Markup]:
    """The parts of the people's screen."""
    return {"people": _panel("people", boards=boards)}


def live_page(screen: str, events: str | None, **values: Any) -> str:
    """A whole screen for the browser; `events`: where it hears what is new."""
    return _page(templates(), screen, live=True, events=events, charts=(), **values)


def saved_page(run: RunDocument, charts: Sequence[Chart]) -> str:
    """A run's screen as one file that needs no other."""
    return still_page(HERE / "templates", "run", run=run, panels=run_panels(run), charts=charts)


def still_page(folder: Path, screen: str, **values: Any) -> str:
    """A screen whose template stands in `folder`, as one file without a script."""
    return _page(templates(folder), screen, live=False, events=None, style=Markup(style()), **values)


def still_part(folder: Path, name: str, **values: Any) -> Markup:
    """A part of such a screen."""
    return Markup(templates(folder).get_template(f"{name}.html").render(**values).strip())


def _page(made: Environment, screen: str, **values: Any) -> str:
    return made.get_template(f"{screen}.html").render(made=date(time.time()), **values)


def _panel(name: str, **values: Any) -> Markup:
    return still_part(HERE / "templates", f"panel_{name}", **values)


def _percent(part: float, whole: float) -> str:
    """A part as a CSS width, at most all of it."""
    return f"{100 * min(part / (whole or 1), 1.0):.3f}%"
