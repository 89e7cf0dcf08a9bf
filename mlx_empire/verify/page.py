"""The fidelity audit as JSON, as lines of a table, and as a page with the loss curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from mlx_empire.report.html import STYLE, table
from mlx_empire.sizes import amount
from mlx_empire.verify.fidelity import Finding

HEAD = ("technique", "must be", "is", "loss difference", "± s.e.", "memory a node saves")
COLOURS = ("--accent", "--no")
WIDTH, HEIGHT = 300, 120


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
    """The report as JSON; loss differences are relative, memory in bytes."""
    return {
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
    """One HTML file without scripts: the table, and for every technique its loss curves over the plain ones."""
    cells = [[escape(cell) for cell in row] for row in rows(report)]
    charts = "".join(
        f"<section><h2>{escape(one.pair.name)}</h2>{_chart(one)}</section>"
        for one in report.findings
        if any(run.losses for run in one.plain)
    )
    verdict, says = "fits", "what must be identical is"
    if report.failed:
        verdict, says = "no", f"{len(report.failed)} techniques changed bits that they must not"
    name = escape(report.model)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Fidelity of {name}</title>'
        f"<style>{STYLE}</style></head><body><main>"
        f'<header class="v-{verdict}"><span class="badge">{says}</span><h1>Fidelity of {name}</h1>'
        f'<p class="muted">{escape(report.what)}</p></header>'
        f"<section>{table(HEAD, cells, (3, 4, 5))}</section>"
        f'<p class="muted small">Blue: everything in float32. Red, dashed: with the technique. One line a seed.</p>'
        f"{charts}</main></body></html>"
    )


def _chart(finding: Finding) -> str:
    curves = [[run.losses for run in runs] for runs in (finding.plain, finding.tried)]
    values = [v for lines in curves for line in lines for v in line]
    low, high = min(values), max(values)
    drawn = ""
    for lines, colour, dash in zip(curves, COLOURS, ("", ' stroke-dasharray="5 4"'), strict=True):
        for line in lines:
            points = " ".join(
                f"{WIDTH * i / max(len(line) - 1, 1):.1f},{HEIGHT - HEIGHT * (v - low) / max(high - low, 1e-12):.1f}"
                for i, v in enumerate(line)
            )
            drawn += (
                f'<polyline points="{points}" fill="none" stroke="var({colour})" stroke-width="1.5"{dash}/>'
            )
    return (
        f'<svg viewBox="-2 -4 {WIDTH + 4} {HEIGHT + 8}" style="width:100%;max-width:720px" role="img" '
        f'aria-label="training loss from {high:.3f} to {low:.3f}">{drawn}</svg>'
        f'<p class="muted small">training loss, {high:.3f} at the top, {low:.3f} at the bottom</p>'
    )
