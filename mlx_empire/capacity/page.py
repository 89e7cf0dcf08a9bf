"""Decides what stands on the capacity page: one self-contained HTML file, nothing from elsewhere.

Made from the same report and surveys as `--json` and the terminal's tables: here they become plain values, which the
templates print, and which they escape. The surveys on it are the matrix as a heat map, the ladder, and the daughters.

What fits, and what is looked up now and then, is folded behind a line that says the most of it. The one script copies a
command at a click; without it the page says the same.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_empire.capacity.charts import (
    SAID,
    NodeBar,
    drawn_once,
    lane_pieces,
    lanes_of,
    node_bars,
    used_groups,
    used_kinds,
)
from mlx_empire.capacity.daughter_document import DaughterSurvey, daughter_tables
from mlx_empire.capacity.disks import disk_columns, disk_notes, disk_rows
from mlx_empire.capacity.document import TIME_COLUMNS, CapacityReport, time_cells
from mlx_empire.capacity.heat_map import HERE, counted_verdicts, matrix_section
from mlx_empire.capacity.ladder import Rung
from mlx_empire.capacity.ledger_groups import alike, ledger_lines, short_names
from mlx_empire.capacity.survey_document import LadderSurvey, MatrixSurvey
from mlx_empire.capacity.whatif import AS_IT_IS, Advice
from mlx_empire.capacity.when import milestones
from mlx_empire.page.render import still_page
from mlx_empire.plan.assess import MOST_LIVE_BUFFERS
from mlx_empire.plan.disk import DiskLedger
from mlx_empire.plan.pace import Pace
from mlx_empire.plan.wired_limit import SYSTEM
from mlx_empire.report.text import billions, run_length, span
from mlx_empire.sizes import amount

MOST_LIMITS = 3  # bars of the ladder are cut off at so many times the largest limit
BEST = 3  # changes that are not folded
COUNTED = {"fits": "fit", "tight": "tight", "no": "too large"}


def capacity_page(
    report: CapacityReport,
    matrix: MatrixSurvey,
    ladder: LadderSurvey,
    daughters: DaughterSurvey,
    command: str,
) -> str:
    """The page's text. `command` is what made it, shown at the end, and with each change that can be typed after it."""
    bars = node_bars(report.nodes)
    return still_page(
        HERE,
        "capacity",
        **SAID,
        report=report,
        command=command,
        span=span,
        **_header(report),
        **_memory(report, bars),
        **_disks(report.disks),
        **_advice(report.advice, command),
        **_time(report),
        **_ladder(ladder),
        matrix=matrix_section(matrix),
        daughters=[
            (title, _verdicts_of(head, rows), head, rows) for title, head, rows in daughter_tables(daughters)
        ],
        daughters_barred=daughters.not_trainable,
        **_ledger(bars),
    )


def _header(report: CapacityReport) -> dict[str, Any]:
    """What a reader wants to know first."""
    spec, worst = report.spec, report.assessment.worst
    left = worst.headroom_bytes
    counts = [f"{spec.base_parameters:,} parameters"]
    if report.active_parameters != spec.base_parameters:
        counts.append(f"{report.active_parameters:,} active per token")
    if spec.trainable_parameters != spec.base_parameters:
        counts.append(f"{spec.trainable_parameters:,} trained")
    return {
        "counts": counts,
        "figures": [
            (amount(abs(left)), f"{'free' if left >= 0 else 'too much'} on {worst.node.name}"),
            *(_paced(report) if report.paces else ()),
            (billions(spec.base_parameters), "parameters"),
        ],
    }


def _paced(report: CapacityReport) -> Iterator[tuple[str, str]]:
    """The figures of time, over the wire that is there."""
    pace = report.paces[0]
    first = pace.first_checkpoint
    yield report.last_days(pace), f"ends, after {run_length(pace.run_hours)}"
    if first:
        yield run_length(first), "to the first checkpoint"
    yield span(pace.step_seconds, " s"), "a step"
    yield span(pace.positions_per_second), "positions per second"


def _memory(report: CapacityReport, bars: Sequence[NodeBar]) -> dict[str, Any]:
    """Each machine's bar, all of one scale; and what shows how much a run really takes."""
    return {
        "bars": bars,
        "bars_scale": max(max(n.node.memory_bytes, n.limit_bytes, n.peak_bytes) for n in report.nodes),
        "groups": used_groups(bars),
        "look": shlex.join(["mlx-empire", "open", str(report.assessment.recipe.run.dir)]),
    }


def _disks(disks: Sequence[DiskLedger]) -> dict[str, Any]:
    """The disks, those with the same figures once; folded behind the most that is asked of one, unless one is short."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, *figures in disk_rows(disks):
        found.setdefault(tuple(figures), []).append(name)
    return {
        "disk_head": disk_columns(disks),
        "disks": [[short_names(names), *figures] for figures, names in found.items()],
        "disks_short": any(one.verdict in ("tight", "no") for one in disks),
        "disks_said": _disks_said(disks),
        "disk_notes": disk_notes(disks),
    }


def _disks_said(disks: Sequence[DiskLedger]) -> str:
    if not disks:
        return ""
    most = max(disks, key=lambda one: one.asked)
    unknown = sum(one.free is None for one in disks)
    fits = "each fits" if len(disks) > 1 else "it fits"
    free = f"what is free is not known on {unknown} of {len(disks)}" if unknown else fits
    return f"At most {amount(most.asked)}, on {most.name}: {free}"


@dataclass(frozen=True)
class Change:
    """A piece of advice, and the commands that carry it out, none where it is something to buy."""

    change: str
    effect: str
    verdict: str
    commands: Sequence[str]


def _advice(advice: Sequence[Advice], command: str) -> dict[str, Any]:
    """What to change, what that brings and what it comes to, the best apart; then what no change would better."""
    changes = [
        Change(one.change, one.effect, one.verdict, _commands(one, command))
        for one in advice
        if one.change != AS_IT_IS
    ]
    return {
        "changes": changes[:BEST],
        "more_changes": changes[BEST:],
        "bests": [one.effect[0].upper() + one.effect[1:] for one in advice if one.change == AS_IT_IS],
    }


def _commands(advice: Advice, command: str) -> list[str]:
    """What can be typed for a piece of advice: this report with other settings, or what raises a machine's limit."""
    if advice.is_settings:
        return [f"{command} {shlex.join(advice.change.split())}"]
    return re.findall(rf"{re.escape(SYSTEM)}=\d+", advice.change)


def _time(report: CapacityReport) -> dict[str, Any]:
    """How long a step takes over each wire and what is in it, and when things come."""
    if not report.paces:
        return {"times": [], "notes": report.notes}
    bounds = {pace.bound for pace in report.paces}
    several = len(bounds) > 1
    return {
        "bound": None if several else bounds.pop(),
        "time_head": ["wire", *TIME_COLUMNS, *(["bound by"] if several else [])],
        "times": [
            [_wire(report, pace), *time_cells(report, pace), *([pace.bound] if several else [])]
            for pace in report.paces
        ],
        "other_wires": ", ".join(report.wire(pace) for pace in report.paces[1:]),
        "milestones": milestones(report),
        "parts": list(report.paces[0].parts),
        "split": [
            [report.wire(pace), *(span(pace.parts[name]) for name in report.paces[0].parts)]
            for pace in report.paces
        ],
        "steps": [_step(report, pace) for pace in report.paces],
        "notes": report.notes,
    }


def _step(report: CapacityReport, pace: Pace) -> tuple[Any, ...]:
    """A step over a wire: its name, the seconds, each machine's lanes with their pieces, and what is in them."""
    lanes = drawn_once(lanes_of(pace.timeline, report.names), pace.timeline.seconds)
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
        "rungs_said": _rungs_said(ladder.rungs),
    }


def _rungs_said(rungs: Sequence[Rung]) -> str:
    """From where on it fits."""
    fit = [rung.assessment.verdict != "no" for rung in rungs]
    if all(fit) or not any(fit):
        return f"{len(rungs)} rungs: it fits on {'each' if all(fit) else 'none'} of them"
    return f"{len(rungs)} rungs: it fits first with “{rungs[fit.index(True)].name.removeprefix('+ ')}”"


def _unlocks(rung: Rung) -> list[str]:
    found = [
        f"{kind}: {largest[0]}" for kind, largest in (("dense", rung.dense), ("MoE", rung.moe)) if largest
    ]
    return found or ["none of the catalog"]


def _verdicts_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """How many of a table's rows fit; empty where they have no verdict."""
    return (
        counted_verdicts((row[head.index("verdict")] for row in rows), COUNTED) if "verdict" in head else ""
    )


def _ledger(bars: Sequence[NodeBar]) -> dict[str, Any]:
    """A ledger for each kind of node; and the other limits."""
    return {
        "ledgers": [(bar, *_entries(bar)) for bar in bars],
        "limits": [
            [
                bar.names,
                f"{amount(bar.of.largest_array_bytes)} of {amount(bar.of.buffer_limit_bytes)}",
                f"{bar.of.live_buffers:,} of {MOST_LIVE_BUFFERS:,}",
                f"at most {amount(bar.of.cache_bound_bytes)}",
            ]
            for bar in bars
        ],
    }


def _entries(bar: NodeBar) -> tuple[str, list[tuple[str, str, str, str]]]:
    """A ledger's unit, and its lines: name, size, how well it is known, how it was found; the last is the peak."""
    unit, _, lines = ledger_lines([bar.of])
    return unit, [(line.name, line.sizes[0], line.mark, line.formula) for line in lines]
