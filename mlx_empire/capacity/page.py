"""Decides what stands on the capacity page: one self-contained HTML file, no script, nothing from elsewhere.

Made from the same report and surveys as `--json` and the terminal's tables: here they become plain values, which the
templates print, and which they escape. The surveys on it are the matrix as a heat map, the ladder, and the daughters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mlx_empire.capacity.charts import (
    SIGNS,
    WORDS,
    lane_pieces,
    lanes_of,
    node_bars,
    used_groups,
    used_kinds,
)
from mlx_empire.capacity.daughter_document import DaughterSurvey, daughter_tables
from mlx_empire.capacity.disks import DISK_COLUMNS, disk_notes, disk_rows
from mlx_empire.capacity.document import TIME_COLUMNS, CapacityReport, LadderSurvey, MatrixSurvey, time_cells
from mlx_empire.capacity.ladder import Rung
from mlx_empire.capacity.ledger_groups import alike, ledger_lines
from mlx_empire.capacity.matrix import Cell, MatrixRow
from mlx_empire.capacity.whatif import AS_IT_IS
from mlx_empire.capacity.when import milestones
from mlx_empire.page.render import still_page, still_part
from mlx_empire.plan.assess import MOST_LIVE_BUFFERS
from mlx_empire.plan.pace import Pace
from mlx_empire.report.text import billions, room, run_length, span
from mlx_empire.sizes import amount

HERE = Path(__file__).parent / "templates"
MOST_LIMITS = 3  # bars of the ladder are cut off at so many times the largest limit
SAID = {"words": WORDS, "signs": SIGNS}


def capacity_page(
    report: CapacityReport,
    matrix: MatrixSurvey,
    ladder: LadderSurvey,
    daughters: DaughterSurvey,
    command: str,
) -> str:
    """The page's text. `command` is what made it, shown at the end."""
    return still_page(
        HERE,
        "capacity",
        **SAID,
        report=report,
        command=command,
        span=span,
        **_header(report),
        **_memory(report),
        **_advice(report),
        **_time(report),
        **_ladder(ladder),
        matrix=matrix_section(matrix),
        daughters=daughter_tables(daughters),
        daughters_barred=daughters.not_trainable,
        **_ledger(report),
    )


@dataclass(frozen=True)
class HeatCell:
    """A model on a cluster: coloured by verdict, the stronger (`depth`, in %) the more room is left; grey where memory
    alone is not the question. `differs`: pooled memory says something else."""

    colour: str
    depth: str
    differs: bool
    pooled: str
    said: str
    room: str


@dataclass(frozen=True)
class HeatRow:
    """A model on all clusters; `barred`: why it cannot be trained."""

    model: str
    barred: str | None
    parameters: str
    cells: Sequence[HeatCell]


def matrix_section(survey: MatrixSurvey) -> Markup:
    """Every model against every cluster; a dashed frame where pooled memory would have said otherwise."""
    clusters, found = survey.matrix.clusters, survey.comparison
    telling = [row for row in survey.by_size if _is_telling(row)]
    rest = [row for row in survey.by_size if not _is_telling(row)]
    differences = found.differences if found is not None else ()
    return still_part(
        HERE,
        "matrix",
        **SAID,
        clusters=clusters,
        telling=[_heat(row, clusters) for row in telling],
        rest=[_heat(row, clusters) for row in rest],
        alike=_alike(rest),
        comparison=found,
        differences=[(d.model, d.cluster, d.file_says, d.verdict, d.why) for d in differences],
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


def _heat(row: MatrixRow, clusters: Sequence[str]) -> HeatRow:
    cells = [_cell(row.cells[name], trainable=row.not_trainable is None) for name in clusters]
    return HeatRow(row.model, row.not_trainable, billions(row.parameters), cells)


def _cell(cell: Cell, *, trainable: bool) -> HeatCell:
    verdict, headroom = cell.verdict, cell.headroom
    depth = 22 if verdict == "no" else 16 + 34 * min(max(headroom, 0.0), 1.0)
    colour, said = (verdict, f"{SIGNS[verdict]} {verdict}") if trainable else ("none", f"memory: {verdict}")
    pooled = cell.pooled_says
    left = f"{room(headroom)} · Z{cell.zero_stage}"
    return HeatCell(colour, f"{depth:.0f}", pooled != verdict, WORDS[pooled], said, left)


def _header(report: CapacityReport) -> dict[str, Any]:
    """What a reader wants to know first."""
    spec, pace, worst = report.spec, report.paces[0], report.assessment.worst
    left = worst.headroom_bytes
    first = pace.first_checkpoint
    counts = [f"{spec.base_parameters:,} parameters"]
    if report.active_parameters != spec.base_parameters:
        counts.append(f"{report.active_parameters:,} active per token")
    if spec.trainable_parameters != spec.base_parameters:
        counts.append(f"{spec.trainable_parameters:,} trained")
    return {
        "counts": counts,
        "figures": [
            (amount(abs(left)), f"{'free' if left >= 0 else 'too much'} on {worst.node.name}"),
            (report.last_days(pace), f"ends, after {run_length(pace.run_hours)}"),
            *([(run_length(first), "to the first checkpoint")] if first else []),
            (span(pace.step_seconds, " s"), "a step"),
            (span(pace.positions_per_second), "positions per second"),
            (billions(spec.base_parameters), "parameters"),
        ],
    }


def _memory(report: CapacityReport) -> dict[str, Any]:
    """Each machine's bar, all of one scale, and the disks."""
    bars = node_bars(report.nodes)
    return {
        "bars": bars,
        "bars_scale": max(max(n.node.memory_bytes, n.limit_bytes, n.peak_bytes) for n in report.nodes),
        "groups": used_groups(bars),
        "disk_head": DISK_COLUMNS,
        "disks": disk_rows(report.disks),
        "disk_notes": disk_notes(report.disks),
    }


def _advice(report: CapacityReport) -> dict[str, Any]:
    """What to change, what that brings and what it comes to; then what no change would better."""
    return {
        "changes": [one for one in report.advice if one.change != AS_IT_IS],
        "bests": [one.effect[0].upper() + one.effect[1:] for one in report.advice if one.change == AS_IT_IS],
    }


def _time(report: CapacityReport) -> dict[str, Any]:
    """How long a step takes over each wire and what is in it, and when things come."""
    bounds = {pace.bound for pace in report.paces}
    several = len(bounds) > 1
    return {
        "bound": None if several else bounds.pop(),
        "time_head": ["wire", *TIME_COLUMNS, *(["bound by"] if several else [])],
        "times": [
            [_wire(report, pace), *time_cells(report, pace), *([pace.bound] if several else [])]
            for pace in report.paces
        ],
        "milestones": milestones(report),
        "parts": list(report.paces[0].parts),
        "split": [
            [report.wire(pace), *(span(pace.parts[name]) for name in report.paces[0].parts)]
            for pace in report.paces
        ],
        "steps": [_step(report, pace) for pace in report.paces],
        "notes": [report.cloud.sentence, *report.notes],
    }


def _step(report: CapacityReport, pace: Pace) -> tuple[Any, ...]:
    """A step over a wire: its name, the seconds, each machine's lanes with their pieces, and what is in them."""
    lanes = lanes_of(pace.timeline, report.names)
    return (
        report.wire(pace),
        pace.timeline.seconds,
        [(lane, lane_pieces(lane)) for lane in lanes],
        used_kinds(lanes),
    )


def _wire(report: CapacityReport, pace: Pace) -> str:
    """A wire's name, and whether the trainer can use it."""
    return report.wire(pace) + ("" if pace.wire.built else " (not built yet)")


def _ladder(ladder: LadderSurvey) -> dict[str, Any]:
    """One rung a technique: memory per kind of node, and the largest models that it makes possible."""
    nodes = [node for rung in ladder.rungs for node in rung.assessment.nodes]
    largest, highest = max(node.limit_bytes for node in nodes), max(node.peak_bytes for node in nodes)
    return {
        "ladder": ladder,
        "rungs": [(rung, alike(rung.assessment.nodes), _unlocks(rung)) for rung in ladder.rungs],
        "rungs_scale": min(max(largest, highest), MOST_LIMITS * largest),
    }


def _unlocks(rung: Rung) -> list[str]:
    found = [
        f"{kind}: {largest[0]}" for kind, largest in (("dense", rung.dense), ("MoE", rung.moe)) if largest
    ]
    return found or ["none of the catalog"]


def _ledger(report: CapacityReport) -> dict[str, Any]:
    unit, kinds, lines = ledger_lines(report.nodes)
    return {
        "unit": unit,
        "kinds": kinds,
        "ledger": lines,
        "limits": [
            [
                names,
                f"{amount(node.largest_array_bytes)} of {amount(node.buffer_limit_bytes)}",
                f"{node.live_buffers:,} of {MOST_LIVE_BUFFERS:,}",
                f"at most {amount(node.cache_bound_bytes)}",
            ]
            for names, node in kinds
        ],
    }
