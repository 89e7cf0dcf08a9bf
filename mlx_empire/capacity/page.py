"""Decides how the capacity page is put together: one self-contained HTML file, no script, nothing from elsewhere.

Made from the same report and surveys as `--json` and the terminal's tables.
"""

from __future__ import annotations

from html import escape

from mlx_empire.capacity.charts import badge, node_bars
from mlx_empire.capacity.daughter_document import DaughterSurvey
from mlx_empire.capacity.document import CapacityReport
from mlx_empire.capacity.ledger_groups import ledger_lines
from mlx_empire.capacity.survey_document import LadderSurvey, MatrixSurvey
from mlx_empire.capacity.survey_sections import daughters_section, ladder_section, matrix_section
from mlx_empire.capacity.timeline import timeline_chart
from mlx_empire.plan.assess import MOST_LIVE_BUFFERS
from mlx_empire.plan.pace import Pace
from mlx_empire.report.html import STYLE, table
from mlx_empire.report.text import amount, energy, run_length, span


def capacity_page(
    report: CapacityReport,
    matrix: MatrixSurvey,
    ladder: LadderSurvey,
    daughters: DaughterSurvey,
    command: str,
) -> str:
    """The page's text. `command` is what made it, shown at the end."""
    parts = (
        _header(report),
        _memory(report),
        _advice(report),
        _time(report),
        ladder_section(ladder),
        matrix_section(matrix),
        daughters_section(daughters),
        _ledger(report),
    )
    title = f"{escape(report.spec.name)}: {report.assessment.verdict}"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<footer>made by <code>{escape(command)}</code></footer>\n</main>\n</body>\n</html>\n"
    )


def _header(report: CapacityReport) -> str:
    spec, verdict, pace = report.spec, report.assessment.verdict, report.paces[0]
    figures = [(f"{spec.base_parameters:,}", "parameters")]
    if report.active_parameters != spec.base_parameters:
        figures.append((f"{report.active_parameters:,}", "active per token"))
    if spec.trainable_parameters != spec.base_parameters:
        figures.append((f"{spec.trainable_parameters:,}", "trained"))
    figures += [
        (span(pace.positions_per_second), "positions per second"),
        (span(pace.step_seconds, " s"), "a step"),
        (run_length(pace.run_hours), "the whole run"),
    ]
    boxes = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in figures
    )
    reason = f"<p>{escape(report.reason)}</p>" if report.reason else ""
    refused = report.not_trainable
    barred = (
        f'<p class="v-no"><b style="color:var(--no)">Not trainable here:</b> {escape(refused)}</p>'
        if refused
        else ""
    )
    return (
        f'<header class="v-{verdict}">{badge(verdict)}<h1>{escape(spec.name)}</h1>'
        f'<p class="muted">{escape(report.setting)}</p>{reason}{barred}<div class="figures">{boxes}</div></header>'
    )


def _memory(report: CapacityReport) -> str:
    return (
        "<section><h2>Memory</h2>"
        '<p class="muted small">What each machine holds at the worst moment of a step. A box is a machine; '
        "the line is what its GPU may use.</p>"
        f"{node_bars(report.nodes)}</section>"
    )


def _time(report: CapacityReport) -> str:
    head = ["wire", "seconds a step", "positions/s", "whole run", "energy", "ends", "bound by"]
    rows = [
        [
            _wire(report, pace),
            span(pace.step_seconds),
            span(pace.positions_per_second),
            run_length(pace.run_hours),
            energy(pace.energy_kwh),
            report.last_days(pace),
            escape(pace.bound),
        ]
        for pace in report.paces
    ]
    parts = list(report.paces[0].parts)
    split = [
        [escape(report.wire(pace)), *(span(pace.parts[name]) for name in parts)] for pace in report.paces
    ]
    notes = "".join(
        f'<p class="muted small">{escape(note)}</p>' for note in (report.cloud.sentence, *report.notes)
    )
    return (
        '<section><h2>Time</h2><p class="muted small">From low to high over what such chips are known to execute, '
        "until it is measured on yours.</p>"
        f"{table(head, rows, (1, 2, 3, 4))}<details><summary>Seconds by what they are spent on</summary>"
        f"{table(['wire', *map(escape, parts)], split, range(1, len(parts) + 1))}</details>"
        f"{_steps(report)}{notes}</section>"
    )


def _steps(report: CapacityReport) -> str:
    """A step's lanes over each wire, the first one open."""
    return "".join(
        f"<details{'' if number else ' open'}><summary>A step over {escape(report.wire(pace))}: "
        f"{span([pace.timeline.seconds] * 2, ' s')} at best</summary>"
        f"{timeline_chart(pace.timeline, report.names, report.wire(pace))}</details>"
        for number, pace in enumerate(report.paces)
    )


def _wire(report: CapacityReport, pace: Pace) -> str:
    """A wire's name, and whether the trainer can use it."""
    return escape(report.wire(pace)) + (
        "" if pace.wire.built else ' <span class="muted small">not built yet</span>'
    )


def _advice(report: CapacityReport) -> str:
    if not report.advice:
        return ""
    items = "".join(
        f"<li><code>{escape(a.change)}</code><span>{escape(a.effect)}</span>{_advised(a.verdict)}</li>"
        for a in report.advice
    )
    return f'<section><h2>What to change</h2><ol class="advice">{items}</ol></section>'


def _advised(verdict: str) -> str:
    known = verdict in ("fits", "tight", "no")
    return badge(verdict) if known else f'<span class="badge v-none">{escape(verdict)}</span>'


def _ledger(report: CapacityReport) -> str:
    unit, kinds, lines = ledger_lines(report.nodes)
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
            f"{amount(node.largest_array_bytes)} of {amount(node.buffer_limit_bytes)}",
            f"{node.live_buffers:,} of {MOST_LIVE_BUFFERS:,}",
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
