"""Decides how the surveys look on the capacity page: the matrix as a heat map, the ladder, and the daughters."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from mlx_empire.capacity.charts import SIGNS, WORDS, badge, thin_bars
from mlx_empire.capacity.daughter_document import DaughterSurvey, daughter_tables
from mlx_empire.capacity.ladder import Rung
from mlx_empire.capacity.ledger_groups import alike
from mlx_empire.capacity.matrix import Cell, Comparison, MatrixRow
from mlx_empire.capacity.survey_document import LadderSurvey, MatrixSurvey
from mlx_empire.report.html import table
from mlx_empire.report.text import billions, room

MOST_LIMITS = 3  # bars of the ladder are cut off at so many times the largest limit


def matrix_section(survey: MatrixSurvey) -> str:
    """Every model against every cluster; a dashed frame where pooled memory would have said otherwise."""
    heads = "".join(f'<th class="cluster">{escape(name)}</th>' for name in survey.matrix.clusters)
    rows = "".join(_matrix_row(row, survey.matrix.clusters) for row in survey.by_size)
    return (
        "<section><h2>Every model on four clusters</h2>"
        '<p class="muted small">With the settings of this recipe: verdict, what is left on the fullest machine, '
        "and the ZeRO stage. A dashed frame: "
        "adding up the memory of all machines would have said something else.</p>"
        f'<div class="scroll"><table class="heat"><thead><tr><th>model</th>'
        f'<th class="number">parameters</th>{heads}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>{_differences(survey.comparison)}</section>"
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
        f"against its limit.</p>{rungs}</section>"
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
