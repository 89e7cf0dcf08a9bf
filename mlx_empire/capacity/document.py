"""Decides what a capacity report, the matrix and the ladder say, and how they are written as JSON (`--json`).

Terminal, page and JSON are made from one `CapacityReport`, so the three cannot say different things. In the JSON
sizes are bytes, times seconds or hours as the key says, pairs are [low, high].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from mlx_empire.capacity.charts import timeline_document
from mlx_empire.capacity.disks import disk_documents
from mlx_empire.capacity.ledger_groups import entries, term
from mlx_empire.capacity.teacher import TeacherPass
from mlx_empire.capacity.whatif import Advice
from mlx_empire.model.closed_forms import active_parameters
from mlx_empire.model.spec import ModelSpec
from mlx_empire.plan.assess import VERDICTS, Assessment, NodeAssessment
from mlx_empire.plan.chips import Chip
from mlx_empire.plan.disk import DiskLedger, disk_verdict
from mlx_empire.plan.fill import bought
from mlx_empire.plan.offload import wear_of
from mlx_empire.plan.pace import Cloud, Pace, ends, spell
from mlx_empire.plan.resolve import reached_layers
from mlx_empire.plan.wired_limit import FORGETS, raising_commands, untouched
from mlx_empire.plan.workload import step_shape
from mlx_empire.recipe.idle import without_effect
from mlx_empire.report.text import energy, run_length, span

Document = dict[str, object]

ONE_MACHINE = "one machine, no wire"


@dataclass(frozen=True)
class CapacityReport:
    """A recipe on nodes: whether it fits, how long it takes, what could be changed.

    `not_trainable`: one sentence why the trainer here cannot train the model, or None. `paces`: one for each wire, the
    first for the wire that is there; none where `no_time` says why. `chips`: of the nodes. `start`: of the run.
    `disks`: of every file system.
    `counted`: what lengths in targets and epochs rest on, empty where there are none.
    `untouched`: the verdict where macOS's own limits hold, None where the plan assumes no others. `teacher`: what the
    pass of one needs, where there is one.
    """

    assessment: Assessment
    not_trainable: str | None
    paces: tuple[Pace, ...]
    advice: Sequence[Advice]
    cloud: Cloud
    chips: Sequence[Chip]
    start: datetime
    disks: Sequence[DiskLedger] = ()
    counted: str = ""
    untouched: str | None = None
    no_time: str | None = None
    teacher: TeacherPass | None = None

    @property
    def verdict(self) -> str:
        """That of the worst machine, of its memory and of its disk, also while a teacher is asked."""
        teacher = "fits" if self.teacher is None else self.teacher.verdict
        return max(self.assessment.verdict, disk_verdict(self.disks), teacher, key=VERDICTS.index)

    @property
    def spec(self) -> ModelSpec:
        """The model as it is tuned."""
        return self.assessment.spec

    @property
    def active_parameters(self) -> int:
        """Parameters that one token passes through."""
        return active_parameters(self.spec)

    @property
    def nodes(self) -> tuple[NodeAssessment, ...]:
        """What each node says to the plan."""
        return self.assessment.nodes

    @property
    def names(self) -> list[str]:
        """The nodes' names."""
        return [node.node.name for node in self.nodes]

    @property
    def reason(self) -> str:
        """Why the worst node or disk does not simply fit; empty where all do."""
        worst = self.assessment.worst
        memory = [f"{worst.node.name}: {worst.reason}"] if worst.reason else []
        if self.teacher is not None and self.teacher.verdict != "fits":
            memory.append(self.teacher.sentence)
        disk = disk_verdict(self.disks)
        return "; ".join([*memory, *(one.reason for one in self.disks if one.reason and one.verdict == disk)])

    @property
    def raises(self) -> dict[str, str]:
        """Machine -> the command that it needs before this plan fits, where macOS was never told."""
        if self.untouched is None:
            return {}
        nodes = [node.node for node in self.nodes]
        peaks = [node.peak_bytes for node in self.nodes]
        return raising_commands(peaks, nodes, [untouched(node) for node in nodes])

    @property
    def limits_in_words(self) -> str:
        """What the plan assumes of macOS's limits, in one sentence; empty where it assumes nothing."""
        if self.untouched is None:
            return ""
        first = f"with macOS's own limits (0.75 of memory): {self.untouched}"
        commands = "; ".join(f"on {name} `{words}`" for name, words in self.raises.items())
        return f"{first}; this plan needs {commands} first; {FORGETS}" if commands else first

    @property
    def setting(self) -> str:
        """The recipe's choices that memory and time hang on, resolved, in one line."""
        recipe, plan = self.assessment.recipe, self.assessment.plan
        layers, unrecomputed = len(plan.shards.units) - 1, plan.work.unrecomputed
        shares = recipe.memory.shares if isinstance(recipe.memory.shares, str) else "given"
        size, micro = recipe.batch.global_size, recipe.batch.micro_size
        words = [
            f"{recipe.tuning.type} tuning" + (" of parts" if recipe.tuning.of_parts else ""),
            f"{size} x {recipe.data.sequence_length:,} positions a step, {micro} rows at a time",
            f"ZeRO {plan.shards.zero_stage}, shares by {shares}" if len(self.nodes) > 1 else "one node",
            f"{max(reached_layers(self.spec) - unrecomputed, 0)} of {layers} layers recomputed",
            *((f"micro-batches pass {plan.work.wave} at a time",) if plan.work.wave else ()),
            *(("their inputs on disk",) if any(step_shape(plan.shards, plan.work, 0).offloaded) else ()),
            *((f"kept {kept}",) if (kept := bought(self.spec, plan.shards, plan.work, plan.ledgers)) else ()),
            f"{recipe.optimizer.state_bits}-bit states, master {recipe.optimizer.master_weights}",
            f"gradients {plan.work.gradient_dtype}",
        ]
        return " · ".join(words)

    @property
    def notes(self) -> list[str]:
        """What the figures of time rest on, and which keys have no effect."""
        notes = [
            f"{chip.name}: {spell(chip.tflops)} TFLOP/s executed ({chip.mark}: {chip.source})"
            for chip in dict.fromkeys(self.chips)
        ]
        notes += [self.counted] if self.counted else []
        notes += [] if self.teacher is None else [self.teacher.sentence]
        timed = [(pace.lengths.steps, pace.step_seconds) for pace in self.paces[:1]]
        wear = wear_of(self.spec, self.assessment.plan, self.names, *(timed[0] if timed else ()))
        notes += [] if wear is None else [wear.told]
        notes += without_effect(self.assessment.recipe, self.spec.trained_dtypes, len(self.nodes))
        return notes

    def wire(self, pace: Pace) -> str:
        """The name of what a pace runs over."""
        return pace.wire.name if len(self.nodes) > 1 else ONE_MACHINE

    def last_days(self, pace: Pace) -> str:
        """The day or the days between which the run would end."""
        return " to ".join(dict.fromkeys(moment.date().isoformat() for moment in ends(pace, self.start)))


TIME_COLUMNS = ("seconds a step", "positions/s", "whole run", "energy", "ends")


def time_cells(report: CapacityReport, pace: Pace) -> list[str]:
    """What `TIME_COLUMNS` say of a wire, for people."""
    return [
        span(pace.step_seconds),
        span(pace.positions_per_second),
        run_length(pace.run_hours),
        "not known" if pace.energy_kwh is None else energy(pace.energy_kwh),
        report.last_days(pace),
    ]


def report_document(report: CapacityReport) -> Document:
    """The report as JSON."""
    assessment, spec = report.assessment, report.spec
    times = [_time(report, pace) for pace in report.paces]
    return {
        "model": {
            "name": spec.name,
            "parameters": spec.base_parameters,
            "trainable_parameters": spec.trainable_parameters,
            "active_parameters": report.active_parameters,
            "family": spec.family,
            "dtype": spec.dtype,
            "not_trainable": report.not_trainable,
        },
        "setting": report.setting,
        "verdict": report.verdict,
        "reason": report.reason,
        "zero_stage": assessment.zero_stage,
        "nodes": [_node(node) for node in report.nodes],
        "time": times[0] if times else None,
        "times": times,
        "no_time": report.no_time,
        "cloud": report.cloud.sentence,
        "advice": [asdict(advice) for advice in report.advice],
        "formulas": _formulas(report.nodes),
        "notes": report.notes,
        "disks": disk_documents(report.disks),
        "untouched_macos": {
            "verdict": report.untouched,
            "commands": [{"name": name, "command": words} for name, words in report.raises.items()],
        },
        "teacher": _teacher(report.teacher),
    }


def _teacher(asked: TeacherPass | None) -> Document | None:
    if asked is None:
        return None
    peaks = None if asked.plan is None else [node.peak_bytes for node in asked.plan.nodes]
    return {
        "path": asked.named,
        "verdict": asked.verdict,
        "peak_bytes": peaks,
        "bytes_per_target": asked.target_bytes,
        "targets": None if asked.size is None else asked.size.targets,
        "hours": None if asked.hours is None else _pair(asked.hours),
        "sentence": asked.sentence,
    }


def _node(node: NodeAssessment) -> Document:
    return {
        "name": node.node.name,
        "role": node.node.role,
        "memory_bytes": node.node.memory_bytes,
        "limit_bytes": node.limit_bytes,
        "share": node.share,
        "ledger": entries(node),
        "phase": node.ledger.largest_phase,
        "peak_bytes": node.peak_bytes,
        "headroom_bytes": node.headroom_bytes,
        "largest_array_bytes": node.largest_array_bytes,
        "buffer_limit_bytes": node.buffer_limit_bytes,
        "live_buffers": node.live_buffers,
        "cache_bound_bytes": node.cache_bound_bytes,
        "verdict": node.verdict,
        "reason": node.reason,
    }


def _time(report: CapacityReport, pace: Pace) -> Document:
    return {
        "wire": report.wire(pace),
        "built": pace.wire.built,
        "step_seconds": _pair(pace.step_seconds),
        "positions_per_second": _pair(pace.positions_per_second),
        "tokens_per_second": _pair(pace.positions_per_second),  # its former name, for programs that read it
        "run_hours": _pair(pace.run_hours),
        "energy_kwh": None if pace.energy_kwh is None else _pair(pace.energy_kwh),
        "ends": [moment.isoformat(timespec="minutes") for moment in ends(pace, report.start)],
        "first_evaluation_hours": _pair(pace.first_evaluation) if pace.first_evaluation else None,
        "first_checkpoint_hours": _pair(pace.first_checkpoint) if pace.first_checkpoint else None,
        "lost_hours": _pair(pace.lost),
        "bound": pace.bound,
        "parts": {name: _pair(seconds) for name, seconds in pace.parts.items()},
        "timeline": timeline_document(pace.timeline, report.names),
    }


def _pair(values: tuple[float, float]) -> list[float]:
    return sorted(float(value) for value in values)


def _formulas(nodes: Sequence[NodeAssessment]) -> Document:
    """Formula in words and mark (exact, derived, fitted, unmeasured) of every name in the nodes' ledgers."""
    names = dict.fromkeys(name for node in nodes for name in node.ledger.items())
    derived = all(node.ledger.derived for node in nodes)
    terms = {name: term(name, derived=derived) for name in names}
    return {name: {"formula": one.formula, "mark": one.known} for name, one in terms.items()}
