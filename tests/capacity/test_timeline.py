"""A step in time: spans that stand for the clock's events, and their drawing."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from support.planning import assess, llama_like, nodes_of, recipe_of

from mlx_empire.capacity.charts import (
    CLOSE,
    KINDS,
    drawn_once,
    lane_pieces,
    lanes_of,
    timeline_document,
    used_kinds,
)
from mlx_empire.capacity.heat_map import HERE
from mlx_empire.page.render import templates
from mlx_empire.plan.hardware import wire_named
from mlx_empire.plan.pace import pace_of
from mlx_empire.plan.step_time import ADD, COMPUTE, DISK, EXCHANGE, WAIT, Event, Timeline


def test_events_that_follow_closely_are_one_span_and_waiting_is_none():
    events = (
        Event(0, WAIT, "bind", 1, 0.0, 1.0),
        Event(0, COMPUTE, "forward", 1, 1.0, 2.0),
        Event(0, COMPUTE, "forward", 2, 2.0, 3.0),
        Event(0, COMPUTE, "backward", 2, 3.0, 5.0),
        Event(0, COMPUTE, "embed", 0, 5.0, 6.0),
        Event(0, COMPUTE, "backward", 1, 8.0, 9.0),
        Event(0, EXCHANGE, "gather", 1, 0.0, 1.0),
        Event(0, EXCHANGE, "reduce", 2, 6.0, 7.0),
        Event(0, ADD, "reduce", 2, 7.0, 7.5),
        Event(0, EXCHANGE, "renew", 1, 9.0, 10.0),
    )
    compute, network = json.loads(json.dumps(timeline_document(Timeline(events, 10.0, 0.0), ["king"])))[
        "lanes"
    ]
    assert compute["spans"] == [["forward", 1.0, 3.0], ["backward", 3.0, 6.0], ["backward", 8.0, 9.0]]
    assert network["spans"] == [
        ["gather", 0.0, 1.0],
        ["reduce", 6.0, 7.0],
        ["add", 7.0, 7.5],
        ["gather", 9.0, 10.0],
    ]


def covered(intervals):
    """How long at least one of the intervals lasts: contributions are added beside the exchange that brings them."""
    edges = sorted({edge for interval in intervals for edge in interval})
    return sum(b - a for a, b in itertools.pairwise(edges) if any(s <= a and b <= e for s, e in intervals))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_spans_are_as_long_as_the_lanes_and_in_order(stage):
    found = assess(recipe_of(f"memory.zero_stage={stage}"), llama_like(), nodes_of([2**30] * 3))
    timeline = pace_of(found, wire_named("10gbe")).timeline
    lanes = lanes_of(timeline, ["a", "b", "c"])
    assert [(lane.node, lane.lane) for lane in lanes] == [
        (node, lane) for node in "abc" for lane in ("compute", "network")
    ]
    for number, lane in enumerate(lanes):
        spans = lane.spans
        assert all(before.end <= after.start + 1e-12 for before, after in itertools.pairwise(spans))
        rank, network = divmod(number, 2)
        own = [
            e
            for e in timeline.events
            if e.rank == rank and e.lane in ((EXCHANGE, ADD) if network else (COMPUTE,))
        ]
        busy = covered([(e.start, e.end) for e in own])
        drawn = sum(end - start for _, start, end in spans)
        events = sum(e.rank == rank for e in timeline.events)
        assert busy - 1e-9 <= drawn <= busy + events * CLOSE * timeline.seconds
        assert {kind for kind, _, _ in spans} <= set(KINDS)


def test_a_disk_that_is_used_has_a_lane_and_its_machines_are_drawn_once():
    events = [
        Event(rank, lane, what, 1, start, start + 2.0)
        for rank in range(3)
        for lane, what, start in ((COMPUTE, "forward", 0.0), (DISK, "offload", 0.5), (DISK, "prefetch", 6.0))
    ]
    drawn = drawn_once(lanes_of(Timeline(tuple(events), 10.0, 0.0), list("abc")), 10.0)
    assert [(lane.node, lane.lane) for lane in drawn] == [
        ("a +2", "compute"), ("a +2", "network"), ("a +2", "disk"),
    ]  # fmt: skip
    assert [lane.spans for lane in drawn] == [
        (("forward", 0.0, 2.0),),
        (),
        (("disk", 0.5, 2.5), ("disk", 6.0, 8.0)),
    ]
    assert used_kinds(drawn)[-1] == ("adapters", "disk")


def test_machines_whose_lanes_look_the_same_are_drawn_once():
    def lanes(*ends):
        events = (Event(rank, COMPUTE, "forward", 1, 0.0, end) for rank, end in enumerate(ends))
        return lanes_of(Timeline(tuple(events), 100.0, 0.0), list("abcd"))

    close, far = 50 + 0.1 * 100 * CLOSE, 50 + 2 * 100 * CLOSE
    drawn = drawn_once(lanes(50.0, close, far, 50.0), 100.0)
    assert [(lane.node, lane.lane) for lane in drawn] == [
        ("a +2", "compute"), ("a +2", "network"), ("c", "compute"), ("c", "network"),
    ]  # fmt: skip
    assert [lane.spans for lane in drawn] == [(("forward", 0.0, 50.0),), (), (("forward", 0.0, far),), ()]


def test_the_chart_names_every_lane_and_escapes_what_it_shows():
    timeline = Timeline((Event(0, COMPUTE, "forward", 1, 0.0, 5.0),), 10.0, 0.0)
    draw = templates(HERE).get_template("drawings.html").module
    compute, network = (
        draw.lane(lane, lane_pieces(lane), timeline.seconds, "a & b", True)
        for lane in lanes_of(timeline, ["<king>"])
    )
    assert 'aria-label="&lt;king&gt;, compute, a &amp; b: 50% of the step"' in compute
    assert 'aria-label="&lt;king&gt;, network, a &amp; b: 0% of the step"' in network
    (style,) = re.findall(r'<i style="(left[^"]*)"', compute + network)
    assert style == "left:0.000%;width:50.000%;background:var(--weights)"
