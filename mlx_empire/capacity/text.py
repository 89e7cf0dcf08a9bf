"""Decides how a capacity report, the matrix, the ladder and the daughters look on a terminal.

Tables with bars, made from the same report as `--json`. On a terminal with colours a node's bar is painted by what
fills it; anywhere else each part is drawn with the letter that the legend explains, so a log file says as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mlx_empire.capacity.daughter_document import DaughterSurvey, daughter_tables
from mlx_empire.capacity.disks import disk_columns, disk_notes, disk_rows
from mlx_empire.capacity.document import TIME_COLUMNS, CapacityReport, time_cells
from mlx_empire.capacity.ledger_groups import GROUPS, alike, entries, grouped, ledger_lines
from mlx_empire.capacity.matrix import Cell, Comparison
from mlx_empire.capacity.survey_document import LadderSurvey, MatrixSurvey
from mlx_empire.capacity.whatif import Advice
from mlx_empire.capacity.when import milestones
from mlx_empire.plan.assess import MOST_LIVE_BUFFERS, NodeAssessment
from mlx_empire.plan.disk import DiskLedger
from mlx_empire.report.text import bar, billions, room, terminal_size
from mlx_empire.sizes import amount

PLAIN_WIDTH = 120
BAR_WIDTH = 40
NAME_WIDTH, MARK_WIDTH, SIZE_WIDTH = 29, 12, 21  # of the ledger's columns; what is left says how
LEFT = ("way", "machine", "weights", "as", "verdict", "disk")  # columns of words
VERDICT_STYLES = {"fits": "green", "tight": "yellow", "no": "bold red"}


def capacity_console(stream: TextIO) -> Console:
    """A console on `stream`; plain text of a fixed width where no person watches."""
    size = terminal_size(stream)
    if size is None:
        return Console(file=stream, force_terminal=False, no_color=True, width=PLAIN_WIDTH)
    return Console(file=stream, force_terminal=True, width=max(size.columns, 80))


def print_report(report: CapacityReport, console: Console) -> None:
    """The whole report: what, verdict, nodes, ledger, time, advice."""
    console.print(heading(report))
    console.print(node_table(report.nodes, console))
    console.print(legend(report.nodes, console))
    console.print()
    console.print(ledger_table(report.nodes, console))
    console.print()
    if report.disks:
        console.print(disk_table(report.disks))
        for note in disk_notes(report.disks):
            console.print(Text(note, "dim"))
        console.print()
    if report.paces:
        console.print(time_table(report))
        console.print()
        console.print(milestone_table(report))
    else:
        console.print(Text(report.no_time or "", "bold"))
    if report.advice:
        console.print()
        console.print(advice_table(report.advice))
    for note in (report.cloud.sentence, *report.notes):
        console.print(Text(note, "dim"))


def heading(report: CapacityReport) -> Group:
    """Verdict, model and setting in three lines."""
    spec, verdict = report.spec, report.verdict
    counts = f"{spec.base_parameters:,} parameters"
    if report.active_parameters != spec.base_parameters:
        counts += f", {report.active_parameters:,} active per token"
    if spec.trainable_parameters != spec.base_parameters:
        counts += f", {spec.trainable_parameters:,} trained"
    first = Text.assemble(verdict_text(verdict), "  ", (spec.name, "bold"), "  ", (counts, "dim"))
    lines: list[Text] = [first, Text(report.setting, "dim")]
    if report.reason:
        lines.append(Text(report.reason, VERDICT_STYLES[verdict]))
    if report.limits_in_words:
        lines.append(Text(report.limits_in_words, "dim"))
    if report.not_trainable:
        lines.append(Text(f"not trainable here: {report.not_trainable}", "bold red"))
    return Group(*lines, Text())


def verdict_text(verdict: str) -> Text:
    """A verdict in its colour; `no` in capitals, for a page without colours."""
    return Text(verdict.upper() if verdict == "no" else verdict, VERDICT_STYLES[verdict])


def node_table(nodes: Sequence[NodeAssessment], console: Console) -> Table:
    """A row per node: share, a bar of what fills its memory up to the limit, figures and verdict."""
    table = plain_table()
    for title in ("node", "role"):
        table.add_column(title, overflow="fold")
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("memory, │ is the limit" if not console.options.ascii_only else "memory, | is the limit")
    for title in ("peak", "limit", "headroom"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    scale = max(max(node.peak_bytes, node.limit_bytes) for node in nodes)
    for node in nodes:
        table.add_row(
            escape(node.node.name),
            escape(node.node.role or "-"),
            f"{node.share:.1%}",
            stacked_bar(node, scale, console),
            amount(node.peak_bytes),
            amount(node.limit_bytes),
            f"{node.headroom_bytes / max(node.limit_bytes, 1):.1%}",
            verdict_text(node.verdict),
        )
    return table


def stacked_bar(node: NodeAssessment, scale: int, console: Console, width: int = BAR_WIDTH) -> Text:
    """What fills a node's memory, `scale` bytes wide, with its limit marked."""
    painted = console.is_terminal and not console.no_color
    block = "#" if console.options.ascii_only else "█"
    cells: list[tuple[str, str]] = []
    total = 0
    groups = {group.key: group for group in GROUPS}
    for key, size in grouped(entries(node)).items():
        total += size
        end = round(width * total / scale)
        group = groups[key]
        cells += [(block if painted else group.letter, group.colour)] * (end - len(cells))
    cells += [("·" if not console.options.ascii_only else ".", "dim")] * (width - len(cells))
    mark = min(round(width * node.limit_bytes / scale), width)
    cells.insert(mark, ("|" if console.options.ascii_only else "│", "bold"))
    return Text.assemble(*cells)


def legend(nodes: Sequence[NodeAssessment], console: Console) -> Text:
    """What the bars' colours or letters mean, those that occur."""
    used = {key for node in nodes for key in grouped(entries(node))}
    painted = console.is_terminal and not console.no_color
    block = "#" if console.options.ascii_only else "█"
    parts = [
        Text.assemble((block if painted else group.letter, group.colour), f" {group.title}")
        for group in GROUPS
        if group.key in used
    ]
    return Text("   ").join(parts)


def ledger_table(nodes: Sequence[NodeAssessment], console: Console) -> Table:
    """Every entry of the ledger, a column for each kind of node, with how it was found; then the other two limits."""
    unit, kinds, lines = ledger_lines(nodes)
    table = plain_table("at the worst moment of a step")
    table.add_column(unit)
    for names, _ in kinds:
        table.add_column(names, justify="right", overflow="fold")
    table.add_column("known", no_wrap=True)
    room = max(console.width - NAME_WIDTH - MARK_WIDTH - SIZE_WIDTH * len(kinds), 20)
    title = "how (in full with --html or --json)"
    table.add_column(title, overflow="ellipsis", no_wrap=True, max_width=room, style="dim")
    for line in lines:
        style = "bold" if line is lines[-1] else None
        table.add_row(escape(line.name), *line.sizes, line.mark, escape(line.formula), style=style)
    caches = [amount(n.cache_bound_bytes) for _, n in kinds]
    arrays = [f"{amount(n.largest_array_bytes)} of {amount(n.buffer_limit_bytes)}" for _, n in kinds]
    table.add_row("largest array", *arrays, "", "against the largest buffer that Metal gives")
    table.add_row("MLX's cache", *caches, "", "freed memory kept for reuse: at most this, beside the peak")
    live = [f"{n.live_buffers:,} of {MOST_LIVE_BUFFERS:,}" for _, n in kinds]
    table.add_row("live buffers", *live, "", "a count, not bytes")
    return table


def disk_table(disks: Sequence[DiskLedger]) -> Table:
    """A row per file system: what lies on it at the worst moment of the run, against what is free."""
    table = plain_table("disk: what is asked for, and what the run cannot do without")
    for name in disk_columns(disks):
        table.add_column(name, overflow="fold", justify="left" if name in LEFT else "right")
    for row in disk_rows(disks):
        table.add_row(*(verdict_text(cell) if cell in VERDICT_STYLES else escape(cell) for cell in row))
    return table


def time_table(report: CapacityReport) -> Table:
    """How long a step and the run take over each wire, and what bounds them."""
    table = plain_table("time: low and high over what the chips are known to execute")
    table.add_column("wire")
    for title in TIME_COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("bound by")
    for pace in report.paces:
        table.add_row(
            escape(report.wire(pace)) + ("" if pace.wire.built else " (planned)"),
            *time_cells(report, pace),
            escape(pace.bound),
            style="bold" if pace is report.paces[0] else None,
        )
    return table


def milestone_table(report: CapacityReport) -> Table:
    """What comes when: evaluation, checkpoint, what a crash costs, the end."""
    table = plain_table("what comes when, evaluations and saves themselves not counted")
    table.show_header = False
    table.add_column("what", no_wrap=True)
    table.add_column("when", overflow="fold")
    for name, value in milestones(report):
        table.add_row(name, value)
    return table


def advice_table(advice: Sequence[Advice]) -> Table:
    """What could be changed, cheapest first."""
    table = plain_table("what to change")
    table.add_column("change", overflow="fold", style="bold")
    table.add_column("effect", overflow="fold")
    table.add_column("then", no_wrap=True)
    for entry in advice:
        shown = verdict_text(entry.verdict) if entry.verdict in VERDICT_STYLES else Text(entry.verdict)
        table.add_row(escape(entry.change), escape(entry.effect), shown)
    return table


def plain_table(title: str | None = None) -> Table:
    """A table without lines, its title on the left."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        header_style="dim",
        padding=(0, 2, 0, 0),
    )


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
