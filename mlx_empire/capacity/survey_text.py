"""Decides how the matrix, the ladder and the daughters look on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mlx_empire.capacity.daughter_document import DaughterSurvey, daughter_tables
from mlx_empire.capacity.ledger_groups import alike
from mlx_empire.capacity.matrix import Cell, Comparison
from mlx_empire.capacity.survey_document import LadderSurvey, MatrixSurvey
from mlx_empire.capacity.text import BAR_WIDTH, VERDICT_STYLES, plain_table, verdict_text
from mlx_empire.report.text import amount, bar, billions, room

LEFT = ("way", "machine", "weights", "as", "verdict")


def print_matrix(survey: MatrixSurvey, console: Console) -> None:
    """Every model against every cluster, and where a file that was given differs."""
    table = plain_table()
    table.add_column("model", overflow="fold")
    table.add_column("parameters", justify="right", no_wrap=True)
    for cluster in survey.matrix.clusters:
        table.add_column(cluster, no_wrap=True)
    for row in survey.by_size:
        cells = [_cell(row.cells[cluster]) for cluster in survey.matrix.clusters]
        name = escape(row.model) + (" †" if row.not_trainable else "")
        table.add_row(name, billions(row.parameters), *cells)
    console.print(table)
    notes = [
        "verdict, what is left on the fullest machine (or too much for it), ZeRO stage; "
        "≠ where the memory of all machines added up would have said otherwise"
    ]
    barred = dict.fromkeys(row.not_trainable for row in survey.matrix.rows if row.not_trainable)
    notes += [f"† {why}" for why in barred]
    for note in notes:
        console.print(Text(note, "dim"))
    if survey.comparison is not None:
        console.print()
        console.print(_differences(survey.comparison))
        if survey.comparison.unknown:
            console.print(Text(f"not in the catalog: {', '.join(survey.comparison.unknown)}", "dim"))


def _cell(cell: Cell) -> Text:
    differs = "≠" if cell.pooled_says != cell.verdict else ""
    figures = f" {room(cell.headroom)} Z{cell.zero_stage}"
    return Text.assemble(verdict_text(cell.verdict), (figures, "dim"), (f" {differs}", "bold"))


def _differences(comparison: Comparison) -> Table:
    table = plain_table(f"differs in {len(comparison.differences)} cells, agrees in {comparison.same}")
    for head in ("model", "cluster", "file", "truth"):
        table.add_column(head, no_wrap=True)
    table.add_column("why", overflow="fold")
    for d in comparison.differences:
        truth = verdict_text(d.verdict) if d.verdict in VERDICT_STYLES else Text(d.verdict, "bold red")
        table.add_row(escape(d.model), d.cluster, d.file_says, truth, escape(d.why))
    return table


def print_ladder(ladder: LadderSurvey, console: Console) -> None:
    """A row per rung and kind of node: a bar up to its limit, and the largest models that the rung makes possible."""
    ascii_only = console.options.ascii_only
    table = plain_table(f"the ladder of {ladder.model}")
    table.add_column("each adds one technique", no_wrap=True)
    table.add_column("node", overflow="fold")
    table.add_column("peak", justify="right", no_wrap=True)
    table.add_column("of its limit", no_wrap=True)
    table.add_column("largest dense, MoE that fit", overflow="fold")
    for rung in ladder.rungs:
        name = escape(rung.name)
        unlocked = ", ".join(largest[0] for largest in (rung.dense, rung.moe) if largest) or "none"
        for index, (names, node) in enumerate(alike(rung.assessment.nodes)):
            part = node.peak_bytes / max(node.limit_bytes, 1)
            drawn = bar(part, BAR_WIDTH // 2, ("#", ".") if ascii_only else ("█", "░"))
            used = Text.assemble((drawn, VERDICT_STYLES[node.verdict]), f" {part:>5.0%}")
            first = (name, escape(unlocked)) if index == 0 else ("", "")
            table.add_row(first[0], escape(names), amount(node.peak_bytes), used, first[1])
    console.print(table)


def print_daughters(daughters: DaughterSurvey, console: Console) -> None:
    """Three tables: training, serving, placement."""
    for title, head, rows in daughter_tables(daughters):
        table = plain_table(title)
        for name in head:
            table.add_column(name, overflow="fold", justify="left" if name in LEFT else "right")
        for row in rows:
            table.add_row(*(verdict_text(cell) if cell in VERDICT_STYLES else escape(cell) for cell in row))
        console.print(table)
        console.print()
    if daughters.not_trainable:
        console.print(Text(daughters.not_trainable, "dim"))
