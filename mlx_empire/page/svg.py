"""How a chart looks without a script: inline SVG in the colours of the style sheet, dark where the page is dark.

What text a chart holds is escaped here; what comes back is markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from markupsafe import Markup, escape

from mlx_empire.page.charts import Chart, ChartLine, Mark
from mlx_empire.page.series import Curve
from mlx_empire.report.picture import ticks

WIDTHS = {4: 400, 6: 600, 8: 820}  # of the drawing, by columns of the page
HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 250, 52, 10, 12, 40
MOST_POINTS = 800  # of a curve: more than a screen of this width has columns
SPARK_WIDTH, SPARK_HEIGHT, SPARK_POINTS = 110, 26, 120
SIGNS = {"restart": "↻", "spike": "▲", "lost": "✗"}

Points = tuple[list[int], list[float]]


def chart_svg(chart: Chart) -> Markup:
    """The chart as an `svg` element, with its legend below it."""
    drawn = [(line, line.curve.points(0, MOST_POINTS)) for line in chart.lines]
    frame = _Frame(chart, [points for _, points in drawn])
    parts = [
        *frame.grid(),
        *(part for mark in chart.marks for part in frame.mark(mark)),
        *(part for line, points in drawn for part in frame.line(line, points)),
    ]
    label = f"{chart.title}: " + "; ".join(_told(line) for line in chart.lines)
    box = f"0 0 {frame.width} {HEIGHT}"
    return Markup('<svg viewBox="{}" role="img" aria-label="{}">{}</svg>{}').format(
        box, label, Markup("").join(parts), _legend(chart)
    )


def sparkline(curve: Curve) -> Markup:
    """A curve as small as a word; nothing where there are no two points."""
    xs, ys = curve.points(0, SPARK_POINTS)
    if len(xs) < 2:
        return Markup("")
    wide, low, high = xs[-1] - xs[0] or 1, min(ys), max(ys)
    across, up = (SPARK_WIDTH - 4) / wide, (SPARK_HEIGHT - 4) / ((high - low) or 1)
    path = " ".join(
        f"{2 + (x - xs[0]) * across:.1f},{SPARK_HEIGHT - 2 - (y - low) * up:.1f}"
        for x, y in zip(xs, ys, strict=True)
    )
    box, label = f"0 0 {SPARK_WIDTH} {SPARK_HEIGHT}", f"loss from {ys[0]:.4g} to {ys[-1]:.4g}"
    return Markup(
        '<svg class="spark" viewBox="{}" role="img" aria-label="{}"><polyline points="{}"/></svg>'
    ).format(box, label, path)


class _Frame:
    """Where steps and values lie on the drawing."""

    def __init__(self, chart: Chart, drawn: Sequence[Points]) -> None:
        self.width, self._log = WIDTHS[chart.columns], chart.log
        xs = [step for points in drawn for step in points[0]]
        ys = [self._scaled(value) for points in drawn for value in points[1]]
        self._bound = chart.bound
        self.first, self.last = min(xs), max(max(xs), min(xs) + 1)
        low, high = min(ys), max(ys)
        if chart.bound is not None:
            bound = self._scaled(chart.bound[0])
            low, high = min(low, bound), max(high, bound)
        room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        self.low = min(0.0, low) if chart.zero else low - room
        self.high = high + room

    def x(self, step: float) -> float:
        return LEFT + (step - self.first) / (self.last - self.first) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return (
            HEIGHT
            - BOTTOM
            - (self._scaled(value) - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)
        )

    def grid(self) -> Iterator[Markup]:
        right, bottom = self.width - RIGHT, HEIGHT - BOTTOM
        for value in self._values():
            y = self.y(value)
            yield Markup('<path class="grid" d="M{} {}H{}"/>').format(LEFT, f"{y:.1f}", right)
            yield _text(LEFT - 7, y + 4, f"{value:.4g}", "end")
        for value in ticks(self.first, self.last, 8 if self.width > 500 else 5):
            if value == int(value):
                yield _text(self.x(value), bottom + 17, f"{value:,.0f}", "middle")
        yield Markup('<path class="axis" d="M{} {}H{}"/>').format(LEFT, bottom, right)
        yield _text((LEFT + right) / 2, HEIGHT - 6, "step", "middle")
        if self._bound is not None:
            value, name = self._bound
            y = self.y(value)
            yield Markup('<path class="bound" d="M{} {}H{}"/>').format(LEFT, f"{y:.1f}", right)
            yield _text(right, y - 5, f"{name} {value:g}", "end")

    def _values(self) -> list[float]:
        """Where the value axis has its figures: round numbers, or whole powers of ten."""
        found = ticks(self.low, self.high, 6)
        return (
            [10**value for value in found if value == int(value)] or [10**v for v in found]
            if self._log
            else found
        )

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def mark(self, mark: Mark) -> Iterator[Markup]:
        if self.first <= mark.step <= self.last:
            x = f"{self.x(mark.step):.1f}"
            yield Markup('<g class="mark {}"><title>step {}: {}</title><path d="M{} {}V{}"/>').format(
                mark.kind, mark.step, mark.text, x, TOP, HEIGHT - BOTTOM
            ) + Markup('<text x="{}" y="{}" text-anchor="middle">{}</text></g>').format(
                x, TOP, SIGNS[mark.kind]
            )

    def line(self, line: ChartLine, points: Points) -> Iterator[Markup]:
        places = [(self.x(x), self.y(y)) for x, y in zip(*points, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        yield Markup('<polyline class="{}" style="stroke:var(--{})" points="{}"/>').format(
            line.form, line.colour, path
        )
        if line.form == "dots" or len(places) == 1:
            apart = min((b[0] - a[0] for a, b in pairwise(places)), default=math.inf)
            radius = 3.5 if apart > 9 else 1.8
            for x, y in places:
                yield Markup('<circle cx="{}" cy="{}" r="{}" style="fill:var(--{})"/>').format(
                    f"{x:.1f}", f"{y:.1f}", radius, line.colour
                )


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(
        f"{x:.1f}", f"{y:.1f}", anchor, text
    )


def _told(line: ChartLine) -> str:
    return f"{line.name} from {line.curve.y[0]:.4g} to {line.curve.y[-1]:.4g}"


def _legend(chart: Chart) -> Markup:
    swatches = [
        Markup('<span><i class="{}" style="background:var(--{})"></i>{}</span>').format(
            line.form, line.colour, line.name
        )
        for line in chart.lines
    ]
    kinds = dict.fromkeys(mark.kind for mark in chart.marks)
    swatches += [Markup("<span>{} {}</span>").format(SIGNS[kind], escape(kind)) for kind in kinds]
    return Markup('<div class="legend">{}</div>').format(Markup("").join(swatches))
