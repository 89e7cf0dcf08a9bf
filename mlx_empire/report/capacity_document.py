"""Decides what a capacity report says, as plain JSON: the one source of `--json`, the terminal and the page.

Sizes are bytes, times seconds or hours as the key says, pairs are [low, high]. Renderers only read documents, so
the three cannot say different things.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from mlx_empire.plan.assess import Assessment, NodeAssessment
from mlx_empire.plan.counts import active_parameters
from mlx_empire.plan.hardware import Chip, Wire
from mlx_empire.plan.pace import Cloud, Pace, ends, spell
from mlx_empire.plan.terms import term
from mlx_empire.plan.whatif import Advice
from mlx_empire.report.timeline import timeline_document

Document = dict[str, Any]

ONE_MACHINE = "one machine, no wire"


def report_document(
    assessment: Assessment,
    paces: Mapping[Wire, Pace],
    advice: Sequence[Advice],
    cloud: Cloud,
    chips: Sequence[Chip],
    now: datetime,
    not_trainable: str | None = None,
) -> Document:
    """The report of one recipe. `paces`: the first for the wire that is there; `now`: when it starts."""
    spec = assessment.spec
    wired = len(assessment.nodes) > 1
    names = [node.node.name for node in assessment.nodes]
    times = [
        time_document(wire, pace, now, wired=wired) | {"timeline": timeline_document(pace.timeline, names)}
        for wire, pace in paces.items()
    ]
    return {
        "model": {
            "name": spec.name,
            "parameters": spec.base_parameters,
            "trainable_parameters": spec.trainable_parameters,
            "active_parameters": active_parameters(spec),
            "family": spec.family,
            "dtype": spec.dtype,
            "not_trainable": not_trainable,
        },
        "setting": setting(assessment),
        "verdict": assessment.verdict,
        "reason": _reason(assessment),
        "zero_stage": assessment.zero_stage,
        "nodes": [node_document(node) for node in assessment.nodes],
        "time": times[0],
        "times": times,
        "cloud": cloud.sentence,
        "advice": [{"change": a.change, "effect": a.effect, "verdict": a.verdict} for a in advice],
        "formulas": formulas(assessment),
        "notes": _notes(next(iter(paces.values())), chips),
    }


def node_document(node: NodeAssessment) -> Document:
    """One node: what it has, what it holds, what it needs."""
    return {
        "name": node.node.name,
        "role": node.node.role,
        "memory_bytes": node.node.memory_bytes,
        "limit_bytes": node.limit_bytes,
        "share": node.share,
        "ledger": {name: size for name, size in node.ledger.items().items() if size},
        "phase": node.ledger.largest_phase,
        "peak_bytes": node.peak_bytes,
        "headroom_bytes": node.headroom_bytes,
        "largest_array_bytes": node.largest_array_bytes,
        "buffer_limit_bytes": node.buffer_limit_bytes,
        "live_buffers": node.live_buffers,
        "verdict": node.verdict,
        "reason": node.reason,
    }


def time_document(wire: Wire, pace: Pace, now: datetime, *, wired: bool) -> Document:
    """What one wire makes of the same plan, and the days between which the run would end."""
    return {
        "wire": pace.wire if wired else ONE_MACHINE,
        "built": wire.built,
        "step_seconds": _pair(pace.step_seconds),
        "positions_per_second": _pair(pace.positions_per_second),
        "tokens_per_second": _pair(pace.positions_per_second),  # its former name, for programs that read it
        "run_hours": _pair(pace.run_hours),
        "energy_kwh": _pair(pace.energy_kwh),
        "ends": [moment.isoformat(timespec="minutes") for moment in ends(pace, now)],
        "bound": pace.bound,
        "parts": {name: _pair(seconds) for name, seconds in pace.parts.items()},
    }


def setting(assessment: Assessment) -> str:
    """The recipe's choices that memory and time hang on, resolved, in one line."""
    recipe, plan = assessment.recipe, assessment.plan
    layers, tail = len(assessment.spec.units) - 1, plan.work.tail
    shares = recipe.memory.shares if isinstance(recipe.memory.shares, str) else "given"
    size, micro = recipe.batch.global_size, recipe.batch.micro_size
    words = [
        f"{recipe.tuning.type} tuning",
        f"{size} x {recipe.data.sequence_length:,} tokens a step, {micro} at a time",
        f"ZeRO {plan.shards.zero_stage}, shares by {shares}" if len(assessment.nodes) > 1 else "one node",
        f"{layers - tail} of {layers} layers recomputed",
        f"{recipe.optimizer.state_bits}-bit states, master {recipe.optimizer.master_weights}",
        f"gradients {plan.work.gradient_dtype}",
    ]
    return " · ".join(words)


def _reason(assessment: Assessment) -> str:
    """Why the worst node does not simply fit; empty where it does."""
    worst = assessment.worst
    if assessment.verdict == "fits" or not worst.reason:
        return ""
    return f"{worst.node.name}: {worst.reason}"


def _pair(values: tuple[float, float]) -> list[float]:
    return sorted(float(value) for value in values)


def formulas(assessment: Assessment) -> Document:
    """Formula in words and mark (exact, fitted, unmeasured) of every name in the nodes' ledgers."""
    names = dict.fromkeys(name for node in assessment.nodes for name in node.ledger.items())
    return {name: {"formula": term(name).formula, "mark": term(name).known} for name in names}


def _notes(pace: Pace, chips: Sequence[Chip]) -> list[str]:
    """What the figures of time rest on."""
    notes = [
        f"{chip.name}: {spell(chip.tflops)} TFLOP/s executed ({chip.mark}: {chip.source})"
        for chip in dict.fromkeys(chips)
    ]
    if not pace.steps_known:
        notes.append(
            f"run.steps counts epochs of data that was not looked at: hours are of {pace.steps:,} steps"
        )
    return notes
