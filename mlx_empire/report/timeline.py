"""Decides how a step in time is shown: per machine a lane of computation and a lane of the network, as spans.

Events that follow one another closely and are of one kind are one span: a reader sees hundreds of them, not thousands.
Made from the clock's fast end (`plan.step_time`); the document is plain JSON, the drawing HTML without a script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mlx_empire.plan.step_time import ADD, EXCHANGE, WAIT, Event, Timeline

CLOSE = 1 / 400  # of the step: gaps below are not seen
LANES = ("compute", "network")
KINDS = ("forward", "head", "backward", "update", "gather", "reduce", "add")
_KIND_OF = {"embed": "backward", "renew": "gather", "replicate": "reduce"}
_COLOURS = {
    "forward": "weights",
    "head": "gathered",
    "backward": "optimizer",
    "update": "gradients",
    "gather": "activations",
    "reduce": "logits",
    "add": "other",
}


def timeline_document(timeline: Timeline, names: Sequence[str]) -> dict[str, Any]:
    """`seconds` of the step, and by machine and lane its spans [kind, start, end] in seconds."""
    lanes = []
    for rank, name in enumerate(names):
        own = [e for e in timeline.events if e.rank == rank and e.lane != WAIT]
        for lane in LANES:
            events = [e for e in own if (e.lane in (EXCHANGE, ADD)) == (lane == "network")]
            lanes.append({"node": name, "lane": lane, "spans": _spans(events, timeline.seconds)})
    return {"seconds": timeline.seconds, "lanes": lanes}


def _spans(events: Sequence[Event], seconds: float) -> list[list[Any]]:
    spans: list[list[Any]] = []
    for event in sorted(events, key=lambda e: (e.start, e.end)):
        kind = "add" if event.lane == ADD else _KIND_OF.get(event.what, event.what)
        last = spans[-1] if spans else None
        if last is not None and last[0] == kind and event.start - last[2] < CLOSE * seconds:
            last[2] = max(last[2], event.end)
        else:
            spans.append([kind, event.start, event.end])
    return spans


def timeline_chart(document: Mapping[str, Any], title: str) -> str:
    """The lanes as bars of one scale, with a legend; `title` names the wire."""
    seconds = document["seconds"]
    rows = []
    for lane in document["lanes"]:
        busy = sum(end - start for _, start, end in lane["spans"])
        label = f"{lane['node']}, {lane['lane']}, {title}: {busy / seconds if seconds else 0:.0%} of the step"
        rows.append(
            f'<span class="small">{escape(lane["node"]) if lane["lane"] == LANES[0] else ""}</span>'
            f'<span class="muted small">{lane["lane"]}</span>'
            f'<div class="lane" role="img" aria-label="{escape(label)}">'
            + "".join(_piece(kind, start, end, seconds) for kind, start, end in lane["spans"])
            + "</div>"
        )
    used = {kind for lane in document["lanes"] for kind, _, _ in lane["spans"]}
    legend = "".join(
        f'<span><i style="background:var(--{_COLOURS[kind]})"></i>{kind}</span>'
        for kind in KINDS
        if kind in used
    )
    legend += '<span><i style="background:var(--track)"></i>waiting</span>'
    return f'<div class="lanes">{"".join(rows)}</div><div class="legend">{legend}</div>'


def _piece(kind: str, start: float, end: float, seconds: float) -> str:
    left, width = (f"{100 * part / seconds:.2f}%" for part in (start, end - start))
    tip = f"{kind}, {start:.3g} to {end:.3g} s"
    return f'<i style="left:{left};width:{width};background:var(--{_COLOURS[kind]})" title="{tip}"></i>'
