"""The fidelity audit as a document (JSON), as lines of a table, and as a page with the loss curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mlx_empire.evaluate.fidelity import Finding
from mlx_empire.report.capacity_charts import table
from mlx_empire.report.capacity_style import STYLE
from mlx_empire.report.text import amount

HEAD = ("technique", "must be", "is", "loss difference", "± s.e.", "memory a node saves")
COLOURS = ("--accent", "--no")
WIDTH, HEIGHT = 300, 120


def document(
    title: Mapping[str, Any], findings: Sequence[Finding], saved: Mapping[str, int | None]
) -> dict[str, Any]:
    """Everything that the audit found; loss differences are relative, memory in bytes."""
    return {
        **title,
        "techniques": [
            {
                "name": f.pair.name,
                "must_be_identical": f.pair.identical,
                "identical": f.same,
                "difference": f.difference,
                "standard_error": f.standard_error,
                "saved_bytes": saved.get(f.pair.name),
                "curves": {
                    "plain": [list(one.losses) for one in f.plain],
                    "technique": [list(one.losses) for one in f.tried],
                },
            }
            for f in findings
        ],
    }


def rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table's cells as plain text."""
    lines: list[tuple[str, ...]] = []
    for one in found["techniques"]:
        error, size = one["standard_error"], one["saved_bytes"]
        is_same = "the same bits" if one["identical"] else "different bits"
        verdict = is_same + (" ✗" if one["must_be_identical"] and not one["identical"] else "")
        lines.append(
            (
                one["name"],
                "the same bits" if one["must_be_identical"] else "close",
                verdict,
                "0" if one["identical"] else f"{100 * one['difference']:+.5f} %",
                "-" if error is None or one["identical"] else f"{100 * error:.5f} %",
                "-" if size is None else amount(size) if size >= 0 else f"needs {amount(-size)} more",
            )
        )
    return lines


def failed(found: Mapping[str, Any]) -> list[str]:
    """Techniques that must not change a bit and did."""
    return [t["name"] for t in found["techniques"] if t["must_be_identical"] and not t["identical"]]


def page(found: Mapping[str, Any]) -> str:
    """One HTML file without scripts: the table, and for every technique its loss curves over the plain ones."""
    cells = [[escape(cell) for cell in row] for row in rows(found)]
    charts = "".join(
        f"<section><h2>{escape(one['name'])}</h2>{_chart(one['curves'])}</section>"
        for one in found["techniques"]
        if any(one["curves"]["plain"])
    )
    bad = failed(found)
    verdict = "no" if bad else "fits"
    says = f"{len(bad)} techniques changed bits that they must not" if bad else "what must be identical is"
    name = escape(str(found["model"]))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Fidelity of {name}</title>'
        f"<style>{STYLE}</style></head><body><main>"
        f'<header class="v-{verdict}"><span class="badge">{says}</span><h1>Fidelity of {name}</h1>'
        f'<p class="muted">{escape(str(found["what"]))}</p></header>'
        f"<section>{table(HEAD, cells, (3, 4, 5))}</section>"
        f'<p class="muted small">Blue: everything in float32. Red, dashed: with the technique. One line a seed.</p>'
        f"{charts}</main></body></html>"
    )


def _chart(curves: Mapping[str, Sequence[Sequence[float]]]) -> str:
    values = [v for lines in curves.values() for line in lines for v in line]
    low, high = min(values), max(values)
    drawn = ""
    for (_, lines), colour, dash in zip(
        curves.items(), COLOURS, ("", ' stroke-dasharray="5 4"'), strict=True
    ):
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
