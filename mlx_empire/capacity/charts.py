"""Decides how memory and time are drawn on the capacity page, without a script.

Memory is a box per machine, filled by what the ledger names, with a line at what its GPU may use. All boxes of a
chart share one scale, so a machine of twice the memory is a box of twice the length. Pieces of HTML in and out; every
text that comes from a recipe, a hostfile or a model is escaped here.

A step in time is per machine a lane of computation and a lane of the network, as spans. Events that follow one
another closely and are of one kind are one span: a reader sees hundreds of them, not thousands. Made from the clock's
fast end (`plan.step_time`); the drawing is HTML without a script.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import NamedTuple

from mlx_empire.capacity.ledger_groups import GROUPS, entries, grouped
from mlx_empire.plan.assess import NodeAssessment
from mlx_empire.plan.step_time import ADD, EXCHANGE, WAIT, Event, Timeline
from mlx_empire.sizes import amount

TITLES = {group.key: group.title for group in GROUPS}
WORDS = {"fits": "fits", "tight": "tight", "no": "does not fit"}
SIGNS = {"fits": "✓", "tight": "!", "no": "✗"}


def badge(verdict: str) -> str:
    """A verdict as a pill, with a sign for those who do not see its colour."""
    return f'<span class="badge v-{verdict}">{SIGNS[verdict]} {WORDS[verdict]}</span>'


def percent(part: float, whole: float) -> str:
    """A part as a CSS width, between 0 and 100 %."""
    return f"{100 * min(max(part / max(whole, 1), 0.0), 1.0):.3f}%"


def node_bars(nodes: Sequence[NodeAssessment]) -> str:
    """A stacked bar per node against its limit, and the legend."""
    scale = max(max(n.node.memory_bytes, n.limit_bytes, n.peak_bytes) for n in nodes)
    rows = "".join(_node(node, scale) for node in nodes)
    used = {key for node in nodes for key in grouped(entries(node))}
    swatches = "".join(
        f'<span><i style="background:var(--{g.key})"></i>{g.title}</span>' for g in GROUPS if g.key in used
    )
    marks = '<span><i class="line"></i>limit of the GPU</span>'
    marks += '<span><i style="background:var(--track)"></i>unused</span>'
    if any(n.peak_bytes > n.limit_bytes for n in nodes):
        marks += '<span><i class="hatch"></i>above the limit</span>'
    return f'<div class="chart">{rows}</div><div class="legend">{swatches}{marks}</div>'


def _node(node: NodeAssessment, scale: int) -> str:
    left = node.headroom_bytes
    room = f"{amount(left)} free" if left >= 0 else f"{amount(-left)} too much"
    label = f"{node.node.name}: {amount(node.peak_bytes)} of {amount(node.limit_bytes)}, {room}"
    return (
        f'<div class="node"><div class="name"><b>{escape(node.node.name)}</b>'
        f'<span class="muted small">{escape(node.node.role or "node")} · {amount(node.node.memory_bytes)}'
        f" · share {node.share:.1%}</span></div>"
        f'<div class="bar" role="img" aria-label="{escape(label)}">'
        f'<i class="machine" style="left:0;width:{percent(node.node.memory_bytes, scale)}"></i>{_parts(node, scale)}'
        f'<i class="limit" style="left:{percent(node.limit_bytes, scale)}"></i></div>'
        f'<div class="says v-{node.verdict}"><b>{SIGNS[node.verdict]} {room}</b><br><span class="muted small">'
        f"{amount(node.peak_bytes)} of {amount(node.limit_bytes)}</span></div></div>"
    )


def _parts(node: NodeAssessment, scale: int) -> str:
    """The filled pieces from the left, in the order of the groups, and the hatching where they pass the limit."""
    pieces, total = [], 0
    for key, size in grouped(entries(node)).items():
        tip = f"{TITLES[key]}: {amount(size)}"
        style = f"left:{percent(total, scale)};width:{percent(size, scale)};background:var(--{key})"
        pieces.append(f'<i class="part" style="{style}" title="{escape(tip)}"></i>')
        total += size
    if total > node.limit_bytes:
        over = total - node.limit_bytes
        style = f"left:{percent(node.limit_bytes, scale)};width:{percent(over, scale)}"
        pieces.append(f'<i class="over" style="{style}" title="{escape(amount(over))} above the limit"></i>')
    return "".join(pieces)


def thin_bars(nodes: Sequence[tuple[str, NodeAssessment]], scale: int) -> str:
    """A rung of the ladder: a thin bar per kind of node (names, one of them), `scale` bytes wide."""
    return "".join(
        f'<span class="small">{escape(names)}</span>'
        f'<span class="small number">{amount(node.peak_bytes)} {SIGNS[node.verdict]}</span>'
        f'<div class="thin v-{node.verdict}">'
        f'<i class="machine" style="left:0;width:{percent(node.limit_bytes, scale)}"></i>'
        f'<i class="fill{" torn" if node.peak_bytes > scale else ""}" '
        f'style="left:0;width:{percent(node.peak_bytes, scale)}"></i>'
        f'<i class="limit" style="left:{percent(node.limit_bytes, scale)}"></i></div>'
        for names, node in nodes
    )


CLOSE = 1 / 400  # of the step: gaps below are not seen
LANES = ("compute", "network")
KINDS = ("forward", "head", "backward", "update", "gather", "reduce", "add")
_KIND_OF = {
    "stash": "forward",
    "reuse": "backward",
    "embed": "backward",
    "renew": "gather",
    "replicate": "reduce",
}
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
