"""Decides how a step in time is shown: per machine a lane of computation and a lane of the network, as spans.

Events that follow one another closely and are of one kind are one span: a reader sees hundreds of them, not thousands.
Made from the clock's fast end (`plan.step_time`); the drawing is HTML without a script.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import NamedTuple

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


class Span(NamedTuple):
    """Events of one kind that follow one another closely; `start` and `end` in seconds."""

    kind: str
    start: float
    end: float


@dataclass(frozen=True)
class Lane:
    """What one machine does in one of `LANES`."""

    node: str
    lane: str
    spans: tuple[Span, ...]


def lanes_of(timeline: Timeline, names: Sequence[str]) -> list[Lane]:
    """The lanes of every machine, in the order of `names` (by rank)."""
    lanes = []
    for rank, name in enumerate(names):
        own = [e for e in timeline.events if e.rank == rank and e.lane != WAIT]
        for lane in LANES:
            events = [e for e in own if (e.lane in (EXCHANGE, ADD)) == (lane == "network")]
            lanes.append(Lane(name, lane, _spans(events, timeline.seconds)))
    return lanes


def _spans(events: Sequence[Event], seconds: float) -> tuple[Span, ...]:
    spans: list[Span] = []
    for event in sorted(events, key=lambda e: (e.start, e.end)):
        kind = "add" if event.lane == ADD else _KIND_OF.get(event.what, event.what)
        last = spans[-1] if spans else None
        if last is not None and last.kind == kind and event.start - last.end < CLOSE * seconds:
            spans[-1] = last._replace(end=max(last.end, event.end))
        else:
            spans.append(Span(kind, event.start, event.end))
    return tuple(spans)


def timeline_document(timeline: Timeline, names: Sequence[str]) -> dict[str, object]:
    """As JSON: `seconds` of the step, and by machine and lane its spans [kind, start, end] in seconds."""
    return {"seconds": timeline.seconds, "lanes": [asdict(lane) for lane in lanes_of(timeline, names)]}


def timeline_chart(timeline: Timeline, names: Sequence[str], title: str) -> str:
    """The lanes as bars of one scale, with a legend; `title` names the wire."""
    seconds, lanes = timeline.seconds, lanes_of(timeline, names)
    rows = []
    for lane in lanes:
        busy = sum(span.end - span.start for span in lane.spans)
        label = f"{lane.node}, {lane.lane}, {title}: {busy / seconds if seconds else 0:.0%} of the step"
        rows.append(
            f'<span class="small">{escape(lane.node) if lane.lane == LANES[0] else ""}</span>'
            f'<span class="muted small">{lane.lane}</span>'
            f'<div class="lane" role="img" aria-label="{escape(label)}">'
            + "".join(_piece(span, seconds) for span in lane.spans)
            + "</div>"
        )
    used = {span.kind for lane in lanes for span in lane.spans}
    legend = "".join(
        f'<span><i style="background:var(--{_COLOURS[kind]})"></i>{kind}</span>'
        for kind in KINDS
        if kind in used
    )
    legend += '<span><i style="background:var(--track)"></i>waiting</span>'
    return f'<div class="lanes">{"".join(rows)}</div><div class="legend">{legend}</div>'


def _piece(span: Span, seconds: float) -> str:
    left, width = (f"{100 * part / seconds:.2f}%" for part in (span.start, span.end - span.start))
    tip = f"{span.kind}, {span.start:.3g} to {span.end:.3g} s"
    return f'<i style="left:{left};width:{width};background:var(--{_COLOURS[span.kind]})" title="{tip}"></i>'
