"""Decides how memory and time are drawn on the capacity page, without a script.

Memory is a box per machine, filled by what the ledger names, with a line at what its GPU may use. All boxes of a
chart share one scale, so a machine of twice the memory is a box of twice the length. Machines that are alike are drawn
once. What comes out are plain values: the templates draw them.

A step in time is per machine a lane of computation, one of the network and, where it is used, one of the disk, as
spans. Events that follow one another closely and are of one kind are one span: a reader sees hundreds of them, not
thousands. Made from the clock's fast end (`plan.step_time`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from mlx_empire.capacity.ledger_groups import GROUPS, entries, grouped, kinds_of, short_names
from mlx_empire.plan.assess import NodeAssessment
from mlx_empire.plan.step_time import ADD, DISK, EXCHANGE, WAIT, Event, Timeline
from mlx_empire.sizes import amount

TITLES = {group.key: group.title for group in GROUPS}
WORDS = {"fits": "fits", "tight": "tight", "no": "does not fit"}
SIGNS = {"fits": "✓", "tight": "!", "no": "✗"}
SAID = {"words": WORDS, "signs": SIGNS}  # what templates need to say a verdict


@dataclass(frozen=True)
class Stretch:
    """A part of a bar: its role of colour in the style sheet, what it is, where it begins and how long it is."""

    colour: str
    text: str
    start: float
    size: float


@dataclass(frozen=True)
class NodeBar:
    """The memory of nodes that are alike: `names` in short, the first of them, and the names of the `others`.

    What it needs in `pieces`, in bytes, and by how much that is above the limit (0 or more).
    """

    names: str
    of: NodeAssessment
    others: Sequence[str]
    pieces: Sequence[Stretch]
    over: int

    @property
    def says(self) -> str:
        """What is left, or too much."""
        left = self.of.headroom_bytes
        return f"{amount(left)} free" if left >= 0 else f"{amount(-left)} too much"


def node_bars(nodes: Sequence[NodeAssessment]) -> list[NodeBar]:
    """A stacked bar for each kind of node, in the order of the groups from the left."""
    bars = []
    for kind in kinds_of(nodes):
        node, names = kind[0], [one.node.name for one in kind]
        pieces: list[Stretch] = []
        total = 0
        for key, size in grouped(entries(node)).items():
            pieces.append(Stretch(key, f"{TITLES[key]}: {amount(size)}", total, size))
            total += size
        over = max(total - node.limit_bytes, 0)
        bars.append(NodeBar(short_names(names), node, names[1:], pieces, over))
    return bars


def used_groups(bars: Sequence[NodeBar]) -> list[tuple[str, str]]:
    """The groups that occur, as (role of colour, title)."""
    used = {piece.colour for bar in bars for piece in bar.pieces}
    return [(group.key, group.title) for group in GROUPS if group.key in used]


CLOSE = 1 / 400  # of the step: gaps below are not seen
LANES = ("compute", "network", "disk")
KINDS = ("forward", "head", "backward", "update", "gather", "reduce", "add", "disk")
_LANE_OF = {EXCHANGE: "network", ADD: "network", DISK: "disk"}
_KIND_OF = {
    "stash": "forward",
    "reuse": "backward",
    "embed": "backward",
    "renew": "gather",
    "replicate": "reduce",
    "offload": "disk",
    "prefetch": "disk",
}
COLOURS = {
    "forward": "weights",
    "head": "gathered",
    "backward": "optimizer",
    "update": "gradients",
    "gather": "activations",
    "reduce": "logits",
    "add": "other",
    "disk": "adapters",
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
    """The lanes of every machine, in the order of `names` (by rank); the disk's where a machine uses it."""
    lanes = []
    shown = LANES if any(e.lane == DISK for e in timeline.events) else LANES[:2]
    for rank, name in enumerate(names):
        own = [e for e in timeline.events if e.rank == rank and e.lane != WAIT]
        for lane in shown:
            events = [e for e in own if _LANE_OF.get(e.lane, "compute") == lane]
            lanes.append(Lane(name, lane, _spans(events, timeline.seconds)))
    return lanes


def _spans(events: Sequence[Event], seconds: float) -> tuple[Span, ...]:
    """Spans that follow one another: of what is added beside its exchange, the part after that."""
    spans: list[Span] = []
    for event in sorted(events, key=lambda e: (e.start, e.end)):
        kind = "add" if event.lane == ADD else _KIND_OF.get(event.what, event.what)
        last = spans[-1] if spans else None
        if last is not None and last.kind == kind and event.start - last.end < CLOSE * seconds:
            spans[-1] = last._replace(end=max(last.end, event.end))
        elif last is None or event.end > last.end:
            spans.append(Span(kind, max(event.start, last.end if last else 0.0), event.end))
    return tuple(spans)


def timeline_document(timeline: Timeline, names: Sequence[str]) -> dict[str, object]:
    """As JSON: `seconds` of the step, and by machine and lane its spans [kind, start, end] in seconds."""
    return {"seconds": timeline.seconds, "lanes": [asdict(lane) for lane in lanes_of(timeline, names)]}


def drawn_once(lanes: Sequence[Lane], seconds: float) -> list[Lane]:
    """Of machines whose lanes look the same, only those of the first, named for all of them."""
    found: dict[tuple[object, ...], list[Sequence[Lane]]] = {}
    each = len({lane.lane for lane in lanes})
    for first in range(0, len(lanes), each or 1):
        own = lanes[first : first + each]
        found.setdefault(tuple(_looks(lane, seconds) for lane in own), []).append(own)
    return [
        replace(lane, node=short_names([own[0].node for own in group]))
        for group in found.values()
        for lane in group[0]
    ]


def _looks(lane: Lane, seconds: float) -> tuple[object, ...]:
    """What is seen of a lane: kinds and places to `CLOSE` of the step."""
    unit = CLOSE * (seconds or 1)
    return tuple((span.kind, round(span.start / unit), round(span.end / unit)) for span in lane.spans)


def lane_pieces(lane: Lane) -> list[Stretch]:
    """A lane's spans, in seconds."""
    return [
        Stretch(
            COLOURS[span.kind],
            f"{span.kind}, {span.start:.3g} to {span.end:.3g} s",
            span.start,
            span.end - span.start,
        )
        for span in lane.spans
    ]


def used_kinds(lanes: Sequence[Lane]) -> list[tuple[str, str]]:
    """The kinds of work that occur, as (role of colour, name)."""
    used = {span.kind for lane in lanes for span in lane.spans}
    return [(COLOURS[kind], kind) for kind in KINDS if kind in used]
