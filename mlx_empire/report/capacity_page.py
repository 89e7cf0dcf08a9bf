"""Decides how the capacity page is put together: one self-contained HTML file, no script, nothing from elsewhere.

Made from the same documents as `--json` and the terminal's tables (`capacity_document`).
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from mlx_empire.plan.assess import MOST_LIVE_BUFFERS
from mlx_empire.report.capacity_charts import badge, node_bars, table
from mlx_empire.report.capacity_style import STYLE
from mlx_empire.report.capacity_surveys import daughters_section, ladder_section, matrix_section
from mlx_empire.report.ledger_groups import ledger_lines
from mlx_empire.report.text import amount, energy, run_length, span
from mlx_empire.report.timeline import timeline_chart

Document = Mapping[str, Any]


def capacity_page(
    report: Document | None,
    matrix: Document | None = None,
    ladder: Document | None = None,
    daughters: Document | None = None,
    command: str = "",
) -> str:
    """The page's text; each part that is None is left out. `command` is what made it, shown at the end."""
    parts = []
    if report is not None:
        parts += [_header(report), _memory(report), _advice(report), _time(report)]
    parts += [
        render(document)
        for render, document in (
            (ladder_section, ladder),
            (matrix_section, matrix),
            (daughters_section, daughters),
        )
        if document is not None
    ]
    if report is not None:
        parts.append(_ledger(report))
    name = escape(report["model"]["name"]) if report is not None else "capacity"
    verdict = f": {report['verdict']}" if report is not None else ""
    made = f"<footer>made by <code>{escape(command)}</code></footer>" if command else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}{verdict}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n{made}\n</main>\n</body>\n</html>\n"
    )


def _header(report: Document) -> str:
    model, time = report["model"], report["time"]
    figures = [(f"{model['parameters']:,}", "parameters")]
    if model["active_parameters"] != model["parameters"]:
        figures.append((f"{model['active_parameters']:,}", "active per token"))
    if model["trainable_parameters"] != model["parameters"]:
        figures.append((f"{model['trainable_parameters']:,}", "trained"))
    if time is not None:
        figures += [
            (span(time["positions_per_second"]), "positions per second"),
            (span(time["step_seconds"], " s"), "a step"),
            (run_length(time["run_hours"]), "the whole run"),
        ]
    boxes = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in figures
    )
    reason = f"<p>{escape(report['reason'])}</p>" if report["reason"] else ""
    refused = model["not_trainable"]
    barred = (
        f'<p class="v-no"><b style="color:var(--no)">Not trainable here:</b> {escape(refused)}</p>'
        if refused
        else ""
    )
    return (
        f'<header class="v-{report["verdict"]}">{badge(report["verdict"])}<h1>{escape(model["name"])}</h1>'
        f'<p class="muted">{escape(report["setting"])}</p>{reason}{barred}<div class="figures">{boxes}</div></header>'
    )


def _memory(report: Document) -> str:
    return (
        "<section><h2>Memory</h2>"
        '<p class="muted small">What each machine holds at the worst moment of a step. A box is a machine; '
        "the line is what its GPU may use.</p>"
        f"{node_bars(report['nodes'])}</section>"
    )


def _time(report: Document) -> str:
    if not report["times"]:
        return ""
    head = ["wire", "seconds a step", "positions/s", "whole run", "energy", "ends", "bound by"]
    rows = [
        [
            _wire(entry),
            span(entry["step_seconds"]),
            span(entry["positions_per_second"]),
            run_length(entry["run_hours"]),
            energy(entry["energy_kwh"]),
            " to ".join(dict.fromkeys(escape(day[:10]) for day in entry["ends"])),
            escape(entry["bound"]),
        ]
        for entry in report["times"]
    ]
    parts = list(dict.fromkeys(name for entry in report["times"] for name in entry["parts"]))
    split = [
        [escape(entry["wire"]), *(span(entry["parts"].get(name, (0.0, 0.0))) for name in parts)]
        for entry in report["times"]
    ]
    notes = "".join(
        f'<p class="muted small">{escape(note)}</p>' for note in (report["cloud"], *report["notes"])
    )
    return (
        '<section><h2>Time</h2><p class="muted small">From low to high over what such chips are known to execute, '
        "until it is measured on yours.</p>"
        f"{table(head, rows, (1, 2, 3, 4))}<details><summary>Seconds by what they are spent on</summary>"
        f"{table(['wire', *map(escape, parts)], split, range(1, len(parts) + 1))}</details>"
        f"{_steps(report)}{notes}</section>"
    )


def _steps(report: Document) -> str:
    """A step's lanes over each wire, the first one open."""
    return "".join(
        f"<details{'' if number else ' open'}><summary>A step over {escape(entry['wire'])}: "
        f"{span([entry['timeline']['seconds']] * 2, ' s')} at best</summary>"
        f"{timeline_chart(entry['timeline'], entry['wire'])}</details>"
        for number, entry in enumerate(report["times"])
    )


def _wire(entry: Document) -> str:
    """A wire's name, and whether the trainer can use it."""
    return escape(entry["wire"]) + (
        "" if entry["built"] else ' <span class="muted small">not built yet</span>'
    )


def _advice(report: Document) -> str:
    if not report["advice"]:
        return ""
    items = "".join(
        f"<li><code>{escape(a['change'])}</code><span>{escape(a['effect'])}</span>{_advised(a['verdict'])}</li>"
        for a in report["advice"]
    )
    return f'<section><h2>What to change</h2><ol class="advice">{items}</ol></section>'


def _advised(verdict: str) -> str:
    known = verdict in ("fits", "tight", "no")
    return badge(verdict) if known else f'<span class="badge v-none">{escape(verdict)}</span>'


def _ledger(report: Document) -> str:
    unit, kinds, lines = ledger_lines(report)
    rows = [
        [
            escape(line.name),
            *line.sizes,
            escape(line.mark),
            f'<span class="muted">{escape(line.formula)}</span>',
        ]
        for line in lines[:-1]
    ]
    rows.append([f"<b>{lines[-1].name}</b>", *(f"<b>{size}</b>" for size in lines[-1].sizes), "", ""])
    limits = [
        [
            escape(names),
            f"{amount(node['largest_array_bytes'])} of {amount(node['buffer_limit_bytes'])}",
            f"{node['live_buffers']:,} of {MOST_LIVE_BUFFERS:,}",
        ]
        for names, node in kinds
    ]
    head = [unit, *(escape(names) for names, _ in kinds), "known", "how"]
    return (
        "<section><h2>The ledger</h2>"
        '<p class="muted small">Exact: counted from the shapes. Fitted: measured on a CPU and fitted. '
        "Unmeasured: by reasoning alone.</p>"
        f"{table(head, rows, range(1, len(kinds) + 1))}"
        f"<details><summary>The other two limits</summary>"
        f"{table(['node', 'largest array', 'live buffers'], limits, (1, 2))}</details></section>"
    )
