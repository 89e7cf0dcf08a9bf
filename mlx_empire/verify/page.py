"""The fidelity audit as JSON, as lines of a table, and as a page with the differences step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from mlx_empire.page.charts import EQUALS, Chart, ChartLine
from mlx_empire.page.render import still_page
from mlx_empire.page.series import Curve
from mlx_empire.report.metrics import strict_json
from mlx_empire.sizes import amount
from mlx_empire.verify.fidelity import ALL, Finding

HEAD = ("technique", "must be", "is", "loss difference", "± s.e.", "memory a node saves")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class FidelityReport:
    """What the audit of a model found. `what`: how it was made, in words. `saved`: bytes that each technique takes off
    the largest node's peak, by its name."""

    model: str
    what: str
    findings: Sequence[Finding]
    saved: Mapping[str, int | None]

    @property
    def failed(self) -> list[str]:
        """Techniques that must not change a bit and did."""
        return [f.pair.name for f in self.findings if f.failed]


def fidelity_document(report: FidelityReport) -> dict[str, object]:
    """The report as JSON; loss differences are relative and null where they are not finite, memory in bytes."""
    document: dict[str, object] = {
        "model": report.model,
        "what": report.what,
        "techniques": [
            {
                "name": f.pair.name,
                "must_be_identical": f.pair.identical,
                "identical": f.same,
                "difference": f.difference,
                "standard_error": f.standard_error,
                "saved_bytes": report.saved.get(f.pair.name),
                "curves": {
                    "plain": [list(one.losses) for one in f.plain],
                    "technique": [list(one.losses) for one in f.tried],
                },
            }
            for f in report.findings
        ],
    }
    return {name: strict_json(value) for name, value in document.items()}


def rows(report: FidelityReport) -> list[tuple[str, ...]]:
    """The table's cells as plain text."""
    lines: list[tuple[str, ...]] = []
    for one in report.findings:
        error, size = one.standard_error, report.saved.get(one.pair.name)
        verdict = "the same bits" if one.same else "different bits"
        lines.append(
            (
                one.pair.name,
                "the same bits" if one.pair.identical else "close",
                verdict + (" ✗" if one.failed else ""),
                "0" if one.same else f"{100 * one.difference:+.5f} %",
                "-" if error is None or one.same else f"{100 * error:.5f} %",
                "-" if size is None else amount(size) if size >= 0 else f"needs {amount(-size)} more",
            )
        )
    return lines


def fidelity_page(report: FidelityReport) -> str:
    """One HTML file without scripts: the table, and for every technique how far its losses are from the plain ones."""
    findings = [one for one in report.findings if any(run.losses for run in one.plain)]
    techniques = [one for one in findings if one.pair.name != ALL]
    if len(techniques) == 1:  # all of it together says the same once more
        findings = techniques
    shown = [(one.pair.name, _sentence(one), _chart(one)) for one in findings]
    return still_page(
        HERE / "templates", "fidelity", report=report, head=HEAD, rows=rows(report), shown=shown
    )


def _sentence(finding: Finding) -> str:
    """What there is to see: a difference, or none."""
    steps, seeds = len(finding.plain[0].losses), len(finding.plain)
    seen = f"{seeds} seed" if seeds == 1 else f"{seeds} seeds"
    if finding.same:
        return f"0 bits differ in {steps:,} steps of {seen}."
    lost = sum(not math.isfinite(apart) for line in _apart(finding) for apart in line)
    if lost:
        told = f"Bits differ on {seen}; {lost:,} of {steps * seeds:,} losses are not finite and cannot be compared."
        return f"{told} What is drawn is the difference of the others." if _lines(finding) else told
    if _lines(finding) == []:
        return f"The losses of {steps:,} steps are the same bits, the weights are not."
    return f"The difference of each step's loss as a part of the loss, without its sign, on {seen}."


def _chart(finding: Finding) -> Chart | None:
    """A line a seed, over the spread of the plain losses between seeds: what is below that is less than chance. None
    where no step's loss is another one."""
    lines, losses = _lines(finding), [run.losses for run in finding.plain]
    if lines and len(losses) > 1:
        spread = [_spread(at) for at in zip(*losses, strict=False)]
        lines.insert(0, ChartLine("spread between seeds", _curve(spread), "faint", "muted"))
    name = finding.pair.name
    return (
        Chart(name, name, tuple(one for one in lines if len(one.curve)), columns=6, log=True)
        if lines
        else None
    )


def _lines(finding: Finding) -> list[ChartLine]:
    """How far apart the losses of each seed are, for those where they are."""
    lines = [
        ChartLine(f"seed {number + 1}", _curve(apart), "line", EQUALS[number % len(EQUALS)])
        for number, apart in enumerate(_apart(finding))
    ]
    return [line for line in lines if len(line.curve)]


def _apart(finding: Finding) -> list[list[float]]:
    """Of each seed, by step, how far apart the losses are as a part of the plain one; 0 where they are the same."""
    pairs = [zip(a.losses, b.losses, strict=False) for a, b in zip(finding.plain, finding.tried, strict=True)]
    return [[_relative(a, b) for a, b in pair] for pair in pairs]


def _relative(plain: float, tried: float) -> float:
    if plain == tried or (math.isnan(plain) and math.isnan(tried)):
        return 0.0
    return abs(tried - plain) / (abs(plain) or math.inf)


def _spread(values: Sequence[float]) -> float:
    """The standard deviation as a part of the mean; not a number where one is none."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return stdev(values) / abs(mean(values)) if mean(values) else 0.0


def _curve(values: Sequence[float]) -> Curve:
    """Over the steps from 1; a logarithmic axis has no place for zero, nor for what is not finite."""
    curve = Curve()
    for step, value in enumerate(values, 1):
        if value > 0 and math.isfinite(value):
            curve.add(step, value)
    return curve
