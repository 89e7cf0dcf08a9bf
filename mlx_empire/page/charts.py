"""Which charts a run has, and what stands on each: the one description that the live page and the saved one draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_empire.page.series import MOST_POINTS, SCORE, WAITED, Curve
from mlx_empire.page.watch import Look
from mlx_empire.recipe.evaluation import HELD_OUT_LOSS, Gate

Form = Literal["faint", "line", "dots"]
# Roles of colours in the style sheet, in the order in which curves of one chart that are equals take them.
EQUALS = ("accent", "held-out", "activations", "optimizer", "logits", "gradients", "other")
CAUSES = {  # the names in `waited_for`, in more words
    "gather": "all-gather",
    "renew": "all-gather of updated weights",
    "reduce": "reduce-scatter",
    "update": "the optimizer",
    "save": "a checkpoint",
}
MOST_MARKS = 100  # of a kind: the last ones
WIDE, NARROW = 8, 4  # columns of twelve


@dataclass(frozen=True)
class ChartLine:
    """A curve and its looks. `colour` is a role in the style sheet."""

    name: str
    curve: Curve
    form: Form
    colour: str


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step."""

    step: int
    kind: Literal["restart", "spike", "lost"]
    text: str


@dataclass(frozen=True)
class Chart:
    """One picture over the steps. `bound`: a line across at this value, and what it is called."""

    key: str
    title: str
    lines: tuple[ChartLine, ...]
    columns: int = NARROW
    marks: tuple[Mark, ...] = ()
    bound: tuple[float, str] | None = None
    zero: bool = False  # the value axis begins at zero
    log: bool = False  # it is logarithmic, where there is no script

    def document(self, most: int = MOST_POINTS) -> dict[str, Any]:
        """As JSON: what it says, and at most `most` points of each curve."""
        return {
            "key": self.key,
            "title": self.title,
            "columns": self.columns,
            "zero": self.zero,
            "bound": self.bound,
            "marks": [[mark.step, mark.kind, mark.text] for mark in self.marks],
            "lines": [
                {
                    "name": one.name,
                    "form": one.form,
                    "colour": one.colour,
                    "points": one.curve.points(0, most),
                }
                for one in self.lines
            ],
        }


def charts_of(look: Look) -> list[Chart]:
    """The charts of one run, without those that have nothing to draw."""
    curves, marks = look.series.curves, tuple(marks_of(look))
    gate = look.overview.recipe.evaluation.stop_when if look.overview.recipe is not None else None

    def line(source: str, name: str, form: Form = "line", colour: str = "accent") -> tuple[ChartLine, ...]:
        curve = curves.get(source)
        return (ChartLine(name, curve, form, colour),) if curve is not None and len(curve) else ()

    loss = (
        *line("loss", "training", "faint"),
        *line("smoothed", "training, smoothed"),
        *line("held out", "held out", "dots", "held-out"),
    )
    waits = [
        one
        for number, cause in enumerate(look.series.named(WAITED))
        for one in line(WAITED + cause, f"waited for {CAUSES.get(cause, cause)}", colour=_equal(number + 1))
        if one.curve.high > 0
    ]
    found = [
        Chart("loss", "Loss", loss, WIDE, marks, _bound(gate, HELD_OUT_LOSS)),
        *_scores(look, gate),
        Chart("norm", "Gradient norm", line("grad_norm", "before clipping"), marks=marks, zero=True),
        Chart("rate", "Learning rate", line("learning_rate", "learning rate"), zero=True),
        Chart("seconds", "Seconds a step", (*line("step_seconds", "a step"), *waits), zero=True, marks=marks),
    ]
    return [chart for chart in found if chart.lines]


def compared(looks: Sequence[Look]) -> list[Chart]:
    """The charts of runs beside each other: their smoothed losses, those on held-out text, and each score."""
    names = {name: None for look in looks for name in look.series.named(SCORE)}
    wanted = [("smoothed", "Training loss, smoothed", WIDE), ("held out", "Loss on held-out text", NARROW)]
    wanted += [(SCORE + name, name, NARROW) for name in names]
    found = []
    for source, title, columns in wanted:
        form: Form = "line" if source == "smoothed" else "dots"
        lines = [
            ChartLine(look.name, look.series.curves[source], form, _equal(number))
            for number, look in enumerate(looks)
            if len(look.series.curves.get(source, ()))
        ]
        if lines:
            found.append(Chart(source, title, tuple(lines), columns))
    return found


def marks_of(look: Look) -> Iterator[Mark]:
    """What happened to a run, by step."""
    for failure in look.overview.launch.failures if look.overview.launch is not None else ():
        again = failure.get("again") is not None
        yield Mark(
            int(failure.get("step") or 0),
            "restart",
            f"{'restarted' if again else 'ended'}: {failure.get('cause', '')}",
        )
    for step in look.series.spikes[-MOST_MARKS:]:
        yield Mark(step, "spike", "spike: the update was left out")
    for step in look.series.lost[-MOST_MARKS:]:
        yield Mark(step, "lost", "the loss was not finite")


def _scores(look: Look, gate: Gate | None) -> Iterator[Chart]:
    for name in look.series.named(SCORE):
        line = ChartLine(name, look.series.curves[SCORE + name], "dots", "fits")
        if len(line.curve):
            yield Chart(SCORE + name, name, (line,), bound=_bound(gate, name))


def _bound(gate: Gate | None, metric: str) -> tuple[float, str] | None:
    """The gate's line on the chart of one of its metrics."""
    part = next((one for one in gate.parts if one.metric == metric), None) if gate is not None else None
    if part is None:
        return None
    value = part.at_least if part.at_least is not None else part.at_most
    return None if value is None else (float(value), "gate")


def _equal(number: int) -> str:
    return EQUALS[number % len(EQUALS)]
