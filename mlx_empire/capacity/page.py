"""Decides how the capacity page is put together: one self-contained HTML file, no script, nothing from elsewhere.

Made from the same report and surveys as `--json` and the terminal's tables.
The surveys on it are the matrix as a heat map, the ladder, and the daughters.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from mlx_empire import __version__
from mlx_empire.capacity.charts import SIGNS, WORDS, badge, node_bars, thin_bars, timeline_chart
from mlx_empire.capacity.daughter_document import DaughterSurvey, daughter_tables
from mlx_empire.capacity.disks import DISK_COLUMNS, disk_notes, disk_rows
from mlx_empire.capacity.document import TIME_COLUMNS, CapacityReport, LadderSurvey, MatrixSurvey, time_cells
from mlx_empire.capacity.ladder import Rung
from mlx_empire.capacity.ledger_groups import alike, ledger_lines
from mlx_empire.capacity.matrix import Cell, Comparison, MatrixRow
from mlx_empire.capacity.whatif import AS_IT_IS
from mlx_empire.capacity.when import milestones
from mlx_empire.plan.assess import MOST_LIVE_BUFFERS
from mlx_empire.plan.pace import Pace
from mlx_empire.report.html import STYLE, table
from mlx_empire.report.text import billions, room, run_length, span
from mlx_empire.sizes import amount

MOST_LIMITS = 3  # bars of the ladder are cut off at so many times the largest limit


def matrix_section(survey: MatrixSurvey) -> str:
    """Every model against every cluster; a dashed frame where pooled memory would have said otherwise."""
    clusters = survey.matrix.clusters
    title = "four clusters" if len(clusters) > 1 else escape(clusters[0])
    telling = [row for row in survey.by_size if _is_telling(row)]
    rest = [row for row in survey.by_size if not _is_telling(row)]
    shown = _heat(telling, clusters) if telling else '<p class="muted">The same everywhere.</p>'
    folded = f"<details><summary>{_alike(rest)}</summary>{_heat(rest, clusters)}</details>" if rest else ""
    return (
        f"<section><h2>Every model on {title}</h2>"
        '<p class="muted small">With the settings of this recipe: verdict, what is left on the fullest machine, '
        "and the ZeRO stage. A dashed frame: "
        "adding up the memory of all machines would have said something else.</p>"
        f"{shown}{folded}{_differences(survey.comparison)}</section>"
    )


def _is_telling(row: MatrixRow) -> bool:
    """Whether the clusters differ, or one says something else than pooled memory would. A single cluster has none to
    be the same as, so each of its rows is telling."""
    cells = row.cells.values()
    alone, alike = len(cells) == 1, len({cell.verdict for cell in cells}) == 1
    return alone or not alike or any(cell.pooled_says != cell.verdict for cell in cells)


def _alike(rows: Sequence[MatrixRow]) -> str:
    """How many models fit everywhere, and nowhere."""
    counts = dict.fromkeys(WORDS, 0)
    for row in rows:
        counts[next(iter(row.cells.values())).verdict] += 1
    said = {"fits": "fit everywhere", "tight": "are tight everywhere", "no": "fit nowhere"}
    return ", ".join(f"{count} {said[verdict]}" for verdict, count in counts.items() if count)


def _heat(rows: Sequence[MatrixRow], clusters: Sequence[str]) -> str:
    heads = "".join(f'<th class="cluster">{escape(name)}</th>' for name in clusters)
    body = "".join(_matrix_row(row, clusters) for row in rows)
    return (
        f'<div class="scroll"><table class="heat"><thead><tr><th>model</th>'
        f'<th class="number">parameters</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _matrix_row(row: MatrixRow, clusters: Sequence[str]) -> str:
    barred = row.not_trainable
    cells = "".join(_cell(row.cells[name], trainable=barred is None) for name in clusters)
    note = f'<br><span class="muted small">{escape(barred)}</span>' if barred else ""
    return f'<tr><th>{escape(row.model)}{note}</th><td class="number">{billions(row.parameters)}</td>{cells}</tr>'


def _cell(cell: Cell, *, trainable: bool) -> str:
    """Coloured by verdict, the stronger the more room is left; grey where memory alone is not the question."""
    verdict, headroom = cell.verdict, cell.headroom
    differs = " differs" if cell.pooled_says != verdict else ""
    depth = 22 if verdict == "no" else 16 + 34 * min(max(headroom, 0.0), 1.0)
    tip = f"pooled memory says: {WORDS[cell.pooled_says]}"
    colour, said = (verdict, f"{SIGNS[verdict]} {verdict}") if trainable else ("none", f"memory: {verdict}")
    return (
        f'<td class="cell v-{colour}{differs}" style="--depth:{depth:.0f}%" title="{escape(tip)}">'
        f"<b>{said}</b><span>{room(headroom)} · Z{cell.zero_stage}</span></td>"
    )


def _differences(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    if not comparison.differences:
        return "<p>The file that it was compared with says the same everywhere.</p>"
    rows = [
        [escape(cell) for cell in (d.model, d.cluster, d.file_says, d.verdict, d.why)]
        for d in comparison.differences
    ]
    return (
        f"<h2>Where it differs from the file</h2>{table(['model', 'cluster', 'file', 'truth', 'why'], rows)}"
    )


def ladder_section(ladder: LadderSurvey) -> str:
    """One rung a technique: memory per kind of node, and the largest models that it makes possible."""
    nodes = [node for rung in ladder.rungs for node in rung.assessment.nodes]
    largest, highest = max(node.limit_bytes for node in nodes), max(node.peak_bytes for node in nodes)
    scale = min(max(largest, highest), MOST_LIMITS * largest)
    rungs = "".join(_rung(rung, scale) for rung in ladder.rungs)
    return (
        f"<section><h2>The ladder: {escape(ladder.model)}</h2>"
        '<p class="muted small">Each rung adds one technique to those above it. Bars: the memory that a machine needs, '
        f"against its limit. A bar with a torn end goes on: it is longer than the drawing.</p>{rungs}</section>"
    )


def _rung(rung: Rung, scale: int) -> str:
    return (
        f'<div class="rung"><div><b>{escape(rung.name)}</b></div>'
        f'<div class="bars">{thin_bars(alike(rung.assessment.nodes), scale)}</div>'
        f'<span class="small">{_unlocks(rung)}</span></div>'
    )


def _unlocks(rung: Rung) -> str:
    kinds = (("dense", rung.dense), ("MoE", rung.moe))
    found = [f"{kind}: {escape(largest[0])}" for kind, largest in kinds if largest]
    return '<span class="muted">largest that fits</span><br>' + "<br>".join(found or ["none of the catalog"])


def daughters_section(daughters: DaughterSurvey) -> str:
    """Tables: training a daughter, serving it, and where each would live."""
    barred = daughters.not_trainable
    parts = [
        f"<h2>{escape(title[0].upper() + title[1:])}</h2>"
        + table(
            [escape(h) for h in head], [[_word(cell) for cell in row] for row in rows], range(2, len(head))
        )
        for title, head, rows in daughter_tables(daughters)
    ]
    note = f'<p class="muted small">{escape(barred)}</p>' if barred else ""
    return f"<section>{''.join(parts)}{note}</section>"


def _word(cell: str) -> str:
    return badge(cell) if cell in WORDS else escape(cell)


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
        _disks(report),
        _advice(report),
        _time(report),
        ladder_section(ladder),
        matrix_section(matrix),
        daughters_section(daughters),
        _ledger(report),
    )
    title = f"{escape(report.spec.name)}: {report.verdict}"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<footer>mlx-empire {__version__} · {report.start:%Y-%m-%d} · made by "
        + f"<code>{escape(command)}</code></footer>\n</main>\n</body>\n</html>\n"
    )


def _header(report: CapacityReport) -> str:
    spec, verdict, pace, worst = report.spec, report.verdict, report.paces[0], report.assessment.worst
    left = worst.headroom_bytes
    figures = [
        (amount(abs(left)), f"{'free' if left >= 0 else 'too much'} on {worst.node.name}"),
        (report.last_days(pace), f"ends, after {run_length(pace.run_hours)}"),
        *([(run_length(pace.first_checkpoint), "to the first checkpoint")] if pace.first_checkpoint else []),
        (span(pace.step_seconds, " s"), "a step"),
        (span(pace.positions_per_second), "positions per second"),
        (billions(spec.base_parameters), "parameters"),
    ]
    counts = [f"{spec.base_parameters:,} parameters"]
    if report.active_parameters != spec.base_parameters:
        counts.append(f"{report.active_parameters:,} active per token")
    if spec.trainable_parameters != spec.base_parameters:
        counts.append(f"{spec.trainable_parameters:,} trained")
    boxes = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in figures
    )
    reason = f"<p>{escape(report.reason)}</p>" if report.reason else ""
    limits = f'<p class="muted">{escape(report.limits_in_words)}</p>' if report.limits_in_words else ""
    refused = report.not_trainable
    barred = (
        f'<p class="v-no"><b style="color:var(--no)">Not trainable here:</b> {escape(refused)}</p>'
        if refused
        else ""
    )
    return (
        f'<header class="v-{verdict}">{badge(verdict)}<h1>{escape(spec.name)}</h1>'
        f'<p class="muted">{escape(report.setting)}<br>{", ".join(counts)}</p>{reason}{limits}{barred}'
        f'<div class="figures">{boxes}</div></header>'
    )


def _memory(report: CapacityReport) -> str:
    return (
        "<section><h2>Memory</h2>"
        '<p class="muted small">What each machine holds at the worst moment of a step. A box is a machine; '
        "the line is what its GPU may use.</p>"
        f"{node_bars(report.nodes)}</section>"
    )


def _disks(report: CapacityReport) -> str:
    if not report.disks:
        return ""
    rows = [[_word(cell) for cell in row] for row in disk_rows(report.disks)]
    notes = "".join(f'<p class="muted small">{escape(note)}</p>' for note in disk_notes(report.disks))
    return (
        "<section><h2>Disk</h2>"
        '<p class="muted small">What lies on each disk at the worst moment of the run: all that is asked for, and the '
        "least that the run cannot do without.</p>"
        f"{table(DISK_COLUMNS, rows, range(1, len(DISK_COLUMNS) - 1))}{notes}</section>"
    )


def _time(report: CapacityReport) -> str:
    bounds = {pace.bound for pace in report.paces}
    head = ["wire", *TIME_COLUMNS, *(["bound by"] if len(bounds) > 1 else [])]
    rows = [
        [
            _wire(report, pace),
            *time_cells(report, pace),
            *([escape(pace.bound)] if len(bounds) > 1 else []),
        ]
        for pace in report.paces
    ]
    which = "Each" if len(report.paces) > 1 else "A step"
    same = f" {which} is bound by {escape(bounds.pop())}." if len(bounds) == 1 else ""
    parts = list(report.paces[0].parts)
    split = [
        [escape(report.wire(pace)), *(span(pace.parts[name]) for name in parts)] for pace in report.paces
    ]
    when = [[escape(name), escape(value)] for name, value in milestones(report)]
    notes = "".join(
        f'<p class="muted small">{escape(note)}</p>' for note in (report.cloud.sentence, *report.notes)
    )
    return (
        '<section><h2>Time</h2><p class="muted small">From low to high over what such chips are known to execute, '
        f"until it is measured on yours.{same}</p>"
        f"{table(head, rows, (1, 2, 3, 4))}{table(['when', ''], when)}"
        f"<details><summary>Seconds by what they are spent on</summary>"
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
    """What to change, what that brings and what it comes to; then what no change would better."""
    items = "".join(
        f"<li><code>{escape(a.change)}</code><span>{escape(a.effect)}</span>{_advised(a.verdict)}</li>"
        for a in report.advice
        if a.change != AS_IT_IS
    )
    best = "".join(
        f'<p class="muted small">{escape(a.effect[0].upper() + a.effect[1:])}.</p>'
        for a in report.advice
        if a.change == AS_IT_IS
    )
    if not items + best:
        return ""
    listed = f'<ol class="advice">{items}</ol>' if items else ""
    return f"<section><h2>What to change</h2>{listed}{best}</section>"


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
            f"at most {amount(node.cache_bound_bytes)}",
        ]
        for names, node in kinds
    ]
    head = [unit, *(escape(names) for names, _ in kinds), "known", "how"]
    return (
        "<section><h2>The ledger</h2>"
        '<p class="muted small">Exact: counted from the shapes. Derived: played from the graphs of the layers. '
        "Fitted: measured on a CPU and fitted. "
        "Unmeasured: by reasoning alone.</p>"
        f"<details><summary>{len(rows) - 1} entries, and their sum</summary>"
        f"{table(head, rows, range(1, len(kinds) + 1))}</details>"
        f"<details><summary>The other limits, and the cache</summary>"
        f"{table(['node', 'largest array', 'live buffers', 'MLX’s cache'], limits, (1, 2, 3))}</details></section>"
    )
