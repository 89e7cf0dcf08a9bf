"""A step as a picture of lanes: the trace format of Chrome and Perfetto (open `trace.json` in ui.perfetto.dev).

Every rank is a process, once as measured and once as predicted, with a lane each for compute, gather, reduce,
optimizer, disk and waiting. Times are microseconds since the first event, which may be the loading of weights long
before the first traced step; measured and predicted steps begin together. Events are the actions of `plan.schedule`,
and loads and saves. The format is the JSON object form of the Trace Event Format: `traceEvents` with complete events
(`ph` "X", `ts`, `dur`) and names of processes and threads as metadata (`ph` "M").
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from mlx_empire.checkpoint.save import Saver
from mlx_empire.cluster.hostfile import Node
from mlx_empire.comm.protocol import Communicator
from mlx_empire.disk import replace_private
from mlx_empire.engine.trace import TRACED_STEPS, StepTrace
from mlx_empire.engine.trainer import Trainer
from mlx_empire.model.spec import ModelSpec
from mlx_empire.optim.flat import FlatOptimizer
from mlx_empire.plan.assess import assess_plan
from mlx_empire.plan.hardware import wire_of
from mlx_empire.plan.pace import chips_of, timeline_of
from mlx_empire.plan.shares import RunPlan
from mlx_empire.plan.step_time import ADD, EXCHANGE, WAIT, Event
from mlx_empire.recipe.schema import Recipe

FILE_NAME = "trace.json"
LANES = ("compute", "gather", "reduce", "optimizer", "disk", "waiting")
_LANE_OF = {
    **dict.fromkeys(("gather", "renew"), "gather"),
    **dict.fromkeys(("reduce", "replicate"), "reduce"),
    **dict.fromkeys(("update", "norm"), "optimizer"),
    **dict.fromkeys(("load", "save", "offload", "prefetch"), "disk"),
}
_MICROSECONDS = 1e6


def lane_of(event: Event) -> str:
    """The lane in which an event is drawn."""
    if event.lane == WAIT:
        return "waiting"
    return "reduce" if event.lane == ADD else _LANE_OF.get(event.what, "compute")


def trace_document(groups: Mapping[str, Iterable[Event]], hostnames: Sequence[str]) -> dict[str, object]:
    """The trace as JSON: `groups` are named `measured` and `predicted`; events' ranks index `hostnames`.

    Events count from the first step's beginning; what was before it, from a time below zero.
    """
    found: list[dict[str, object]] = []
    listed = {group: list(events) for group, events in groups.items()}
    first = min(
        (event.start for events in listed.values() for event in events if event.start < 0), default=0.0
    )
    for number, (group, events) in enumerate(listed.items()):
        for rank, host in enumerate(hostnames):
            process = rank * len(groups) + number
            names = [("process_name", 0, f"rank {rank} on {host}, {group}")]
            names += [("thread_name", lane, text) for lane, text in enumerate(LANES)]
            found += [
                {"ph": "M", "name": kind, "pid": process, "tid": lane, "args": {"name": text}}
                for kind, lane, text in names
            ]
        for event in sorted(events, key=lambda e: (e.rank, e.start)):
            found.append(
                {
                    "ph": "X",
                    "name": f"{'add' if event.lane == ADD else event.what} {_unit(event)}".rstrip(),
                    "cat": lane_of(event),
                    "pid": event.rank * len(groups) + number,
                    "tid": LANES.index(lane_of(event)),
                    "ts": round((event.start - first) * _MICROSECONDS, 3),
                    "dur": round((event.end - event.start) * _MICROSECONDS, 3),
                }
            )
    return {"traceEvents": found, "displayTimeUnit": "ms"}


class RunTrace:
    """Traces the first steps of a run, or of one that goes on, and the loads before; made on all ranks, or on none.

    `predicted`: the clock's events, asked of rank 0.
    """

    def __init__(
        self,
        comm: Communicator,
        folder: Path,
        trainer: Trainer,
        saver: Saver,
        predicted: Callable[[], Iterable[Event]],
    ) -> None:
        comm.gather_json(None)  # so that all ranks' clocks begin together
        self._comm, self._folder, self._trainer, self._saver = comm, folder, trainer, saver
        self._predicted, self._trace, self._left = predicted, StepTrace(comm.rank), TRACED_STEPS
        trainer.observe(self._trace)
        saver.observe(self._trace.exchange)

    def step(self) -> list[str]:
        """A step is done; after the last that is traced the file is written, and told in a line. Collective."""
        self._left -= 1
        return self._write() if self._left == 0 else []

    def finish(self) -> list[str]:
        """No step follows: write what fewer steps gave. Collective."""
        return self._write() if 0 < self._left < TRACED_STEPS else []

    def _write(self) -> list[str]:
        self._left = 0
        self._trainer.observe(None)
        self._saver.observe(None)
        for unit, start, end in self._trainer.store.loads:
            self._trace.add(EXCHANGE, ("load", unit), start, end)
        by_rank = self._comm.gather_json(self._trace.events)
        if self._comm.rank > 0:
            return []
        measured = [Event(*event) for events in by_rank for event in events]
        groups, notes = {"measured": measured}, []
        try:
            groups["predicted"] = list(self._predicted())
        except Exception as error:  # a run does not end because it could not be predicted
            notes = [f"WARNING: the trace has no prediction: {type(error).__name__}: {error}"]
        path = self._folder / FILE_NAME
        try:
            document = trace_document(groups, self._comm.hostnames)
            replace_private(path, json.dumps(document, separators=(",", ":")) + "\n")
        except OSError as error:
            return [*notes, f"WARNING: {path}: {error.strerror}: the trace is not written"]
        return [*notes, f"the trace of the first steps is in {path}: open it in ui.perfetto.dev"]


def predicted_events(
    recipe: Recipe, plan: RunPlan, spec: ModelSpec, nodes: Sequence[Node], optimizer: FlatOptimizer
) -> Sequence[Event]:
    """The clock's events of a step by `plan`, at the best that chips and wire may do."""
    assessment = assess_plan(recipe, plan, spec, nodes, lambda _: optimizer.state_bytes)
    return timeline_of(assessment, wire_of(nodes), chips_of(assessment), 1).events


def _unit(event: Event) -> str:
    """What the event is about: the root, a layer (from 1), a saved step, or everything."""
    if event.what == "save":
        return f"step {event.unit}"
    if event.what in ("head", "score") or event.unit < 0:
        return ""
    return f"layer {event.unit}" if event.unit else "root"
