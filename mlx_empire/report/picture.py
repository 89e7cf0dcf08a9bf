"""Decides how a run's loss looks on paper: an SVG file with the training loss, each step's faint behind its running
mean, and that on held-out text.

python -m mlx_empire.report.picture runs/quickstart [loss.svg]
"""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from mlx_empire.errors import UserArguments, UserError
from mlx_empire.report.metrics import read_metrics

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 40, 45
TRAIN, HELD_OUT = "#4c78a8", "#e45756"
# Paper is white; a page that shows the picture may be dark.
STYLE = (
    "<style>rect{fill:white}text{fill:#444}.grid{stroke:#ddd}@media (prefers-color-scheme: dark)"
    "{rect{fill:#0d1117}text{fill:#c4ccd6}.grid{stroke:#2f3944}}</style>"
)
MAX_POINTS = 1000
SMOOTHING = 0.9  # of the running mean, a point

Point = tuple[float, float]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, at most about `about`: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MAX_POINTS points, each the mean of its neighbours, so that a long run stays a small file."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), max(size, 1))]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups
    ]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean of each point's value and those before it, which forgets, without the pull of its beginning."""
    mean, weight, found = 0.0, 0.0, []
    for x, y in points:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * y, SMOOTHING * weight + 1 - SMOOTHING
        found.append((x, mean / weight))
    return found


def loss_picture(records: Sequence[Mapping[str, Any]], title: str) -> str:
    """The SVG text of the records of `metrics.jsonl`; UserError where none has a loss."""
    train = thinned([(r["step"], r["loss"]) for r in records if r.get("loss") is not None])
    held_out = [(r["step"], r["eval_loss"]) for r in records if r.get("eval_loss") is not None]
    points = train + held_out
    if not points:
        raise UserError(f"{title}: no finite loss in its metrics, so there is nothing to draw")
    last = max(x for x, _ in points)
    first = min(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    margin = 0.05 * (high - low) or 0.5
    low, high = low - margin, high + margin

    def place(point: Point) -> Point:
        across = (point[0] - first) / ((last - first) or 1)
        up = (point[1] - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12">{STYLE}',
        f'<rect width="{WIDTH}" height="{HEIGHT}"/>',
        _text(LEFT, 22, title, size=14),
    ]
    for value in ticks(low, high):
        _, y = place((first, value))
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" class="grid"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{value:.4g}", "end"))
    for value in ticks(first, last):
        x, _ = place((value, low))
        parts.append(_text(x, HEIGHT - BOTTOM + 18, f"{value:g}", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "step", "middle"))
    parts.append(f'<g transform="rotate(-90 14 {HEIGHT / 2})">{_text(14, HEIGHT / 2, "loss", "middle")}</g>')
    parts.append(
        f'<g opacity=".4">{"".join(_curve([place(point) for point in train], TRAIN, dots=False))}</g>'
    )
    parts += _curve([place(point) for point in smoothed(train)], TRAIN, dots=False)
    parts += _curve([place(point) for point in held_out], HELD_OUT, dots=True)
    parts += _legend(0, "training loss, smoothed", TRAIN)
    if held_out:
        parts += _legend(1, "loss on held-out text", HELD_OUT)
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _curve(points: Sequence[Point], colour: str, dots: bool) -> list[str]:
    if not points:
        return []
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    line = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
    circles = (
        [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in points] if dots else []
    )
    return [line, *circles]


def _legend(row: int, name: str, colour: str) -> list[str]:
    """A name beside its colour, above the drawing, where no line of the grid is."""
    x, y = WIDTH - RIGHT - 180 * (2 - row), 22
    return [f'<path d="M{x} {y - 4}h18" stroke="{colour}" stroke-width="3"/>', _text(x + 26, y, name)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the run named first into the file named second (by default loss.svg in the run's folder)."""
    parser = UserArguments(prog="python -m mlx_empire.report.picture", description="Draw a run's loss.")
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("out", type=Path, nargs="?", help="the SVG file; RUN/loss.svg if not given")
    try:
        options = parser.parse_args(arguments)
        out = options.out or options.run / "loss.svg"
        title = Path(os.path.abspath(options.run)).name  # the run may be "." or ".."
        out.write_text(loss_picture(read_metrics(options.run), title), encoding="utf-8")
    except OSError as error:
        print(f"picture: {error.filename}: {error.strerror}; give the folder of a run", file=sys.stderr)
        return UserError.exit_code
    except UserError as error:
        print(f"picture: {error}", file=sys.stderr)
        return error.exit_code
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
