"""The trace of a step: its format, its lanes, and that the predicted one is the clock's."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
from support.planning import assess, llama_like, nodes_of, recipe_of

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.plan.hardware import wire_named
from mlx_empire.plan.pace import chips_of, pace_of, timeline_of
from mlx_empire.plan.step_time import ADD, COMPUTE, EXCHANGE, WAIT, Event
from mlx_empire.report.trace import LANES, RunTrace, lane_of, trace_document

EVENTS = [
    (Event(0, COMPUTE, "forward", 2, 0.5, 1.5), "compute", "forward layer 2"),
    (Event(0, COMPUTE, "head", 0, 1.5, 2.0), "compute", "head"),
    (Event(1, EXCHANGE, "gather", 0, 0.0, 0.25), "gather", "gather root"),
    (Event(1, EXCHANGE, "renew", 1, 3.0, 3.5), "gather", "renew layer 1"),
    (Event(1, EXCHANGE, "reduce", 1, 1.0, 2.0), "reduce", "reduce layer 1"),
    (Event(1, ADD, "reduce", 1, 2.0, 2.125), "reduce", "add layer 1"),
    (Event(0, COMPUTE, "update", 1, 2.5, 2.75), "optimizer", "update layer 1"),
    (Event(0, WAIT, "norm", -1, 2.0, 2.5), "waiting", "norm"),
    (Event(0, WAIT, "bind", 1, 0.0, 0.5), "waiting", "bind layer 1"),
    (Event(0, EXCHANGE, "save", 12, 0.0, 4.0), "disk", "save step 12"),
    (Event(1, EXCHANGE, "load", 2, 0.5, 1.0), "disk", "load layer 2"),
]


def test_every_event_has_its_lane_name_and_microseconds():
    document = json.loads(
        json.dumps(trace_document({"measured": [e for e, _, _ in EVENTS]}, ["king", "soldier"]))
    )
    names = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in document["traceEvents"] if e["name"] == "thread_name"
    }
    drawn = {e["name"]: e for e in document["traceEvents"] if e["ph"] == "X"}
    assert len(drawn) == len(EVENTS)
    for event, lane, name in EVENTS:
        found = drawn[name]
        assert lane_of(event) == found["cat"] == names[found["pid"], found["tid"]] == lane
        assert (found["pid"], found["ts"], found["dur"]) == (
            event.rank,
            event.start * 1e6,
            (event.end - event.start) * 1e6,
        )


def test_measured_and_predicted_stand_side_by_side_for_every_rank():
    document = trace_document({"measured": [], "predicted": []}, ["king", "soldier"])
    processes = [e["args"]["name"] for e in document["traceEvents"] if e["name"] == "process_name"]
    assert sorted(processes) == [
        *("rank 0 on king, measured", "rank 0 on king, predicted"),
        *("rank 1 on soldier, measured", "rank 1 on soldier, predicted"),
    ]
    ids = [(e["pid"], e["tid"]) for e in document["traceEvents"] if e["name"] == "thread_name"]
    assert len(set(ids)) == len(ids) == 4 * len(LANES)


def test_the_predicted_trace_is_as_long_as_the_predicted_step():
    found = assess(recipe_of("memory.zero_stage=3"), llama_like(), nodes_of([2**30, 2**30]))
    wire = wire_named("10gbe")
    for i in (0, 1):
        timeline = timeline_of(found, wire, chips_of(found), i)
        pace = pace_of(found, wire)
        seconds = pace.step_seconds[1 - i] - pace.parts["disk"][1 - i]
        assert max(e.end for e in timeline.events) == pytest.approx(seconds)
        assert {lane_of(e) for e in timeline.events} == {
            "compute",
            "gather",
            "reduce",
            "optimizer",
            "waiting",
        }


class Observed:
    """Stands for trainer and saver: whoever observes them, and what was loaded."""

    observer = None

    def __init__(self, *loads):
        self.store = SimpleNamespace(loads=list(loads))

    def observe(self, observer):
        self.observer = observer


def unpredictable():
    raise RuntimeError("no such chip")


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_short_run_and_one_that_cannot_be_predicted_have_a_trace_too(steps, tmp_path):
    trainer, saver = Observed(), Observed()
    trace = RunTrace(SoloCommunicator("king"), tmp_path, trainer, saver, unpredictable)
    lines = []
    for step in range(steps):
        trainer.observer.add(COMPUTE, ("forward", 1), 2.0 * step, 2.0 * step + 1)
        lines += trace.step()
    lines += trace.finish()
    assert lines[0].startswith("WARNING")
    assert "RuntimeError: no such chip" in lines[0]
    drawn = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    assert [e["dur"] for e in drawn] == [1e6] * steps
    assert (trainer.observer, saver.observer) == (None, None)
    assert trace.finish() == []


def test_loads_before_the_first_step_come_first_and_the_steps_stay_side_by_side(tmp_path):
    """Two seconds of loading end a second before the trace is made; a predicted step begins with it."""
    now = time.perf_counter()
    trainer = Observed((0, now - 3.0, now - 2.0), (4, now - 2.0, now - 1.0))
    predicted = [Event(0, COMPUTE, "forward", 1, 0.0, 0.5)]
    trace = RunTrace(SoloCommunicator("king"), tmp_path, trainer, Observed(), lambda: predicted)
    made = time.perf_counter()
    trainer.observer.add(COMPUTE, ("forward", 1), made, made + 1)
    trace.step()
    trace.finish()
    drawn = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    assert [e["name"] for e in drawn] == ["load root", "load layer 4", *2 * ["forward layer 1"]]
    root, layer, measured, forecast = drawn
    assert root["cat"] == layer["cat"] == "disk"
    assert (root["ts"], root["dur"]) == (0.0, pytest.approx(1e6))
    assert layer["ts"] == pytest.approx(1e6)
    assert 3e6 <= forecast["ts"] <= measured["ts"] <= forecast["ts"] + (made - now) * 1e6


def test_a_run_without_steps_has_no_trace(tmp_path):
    trace = RunTrace(SoloCommunicator("king"), tmp_path, Observed(), Observed(), list)
    assert trace.finish() == []
    assert not (tmp_path / "trace.json").exists()
