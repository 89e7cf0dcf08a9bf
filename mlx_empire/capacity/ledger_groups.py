"""Decides how a person sees a memory ledger: its many names in a few groups with colours and letters, or line by line.

Names are matched by the words in them, first rule first, so a name that a ledger gains later falls into a fitting
group, or into the last one, and never out of the sum.

And what every name stands for: its formula in words, and how well it is known. `exact` follows from the plan and from
the engine's order of events; `derived` is played from the graph of the model's own layers, as MLX evaluates it on a
CPU; `fitted` was fitted to measured peaks on a CPU; `unmeasured` is an estimate that nothing has confirmed. Of a model
whose layers cannot be traced what is else derived is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mlx_empire.plan.assess import NodeAssessment
from mlx_empire.sizes import GIB, MIB, amount


class Term(NamedTuple):
    """One name of the ledger."""

    formula: str
    known: str  # exact | derived | fitted | unmeasured


_TERMS = {
    "weights": Term("bytes of the weights that stay: the share at stage 3, all of them below", "exact"),
    "adapters": Term("4 bytes for each element of the adapters that stay", "exact"),
    "optimizer m": Term("4 bytes for each element of the share: first moment in fp32", "exact"),
    "optimizer v": Term("4 bytes for each element of the share: second moment in fp32", "exact"),
    "optimizer m_codes": Term("1 byte for each element of the share: first moment in 8 bits", "exact"),
    "optimizer m_scale": Term("2 bytes for each 64 elements: scale of the first moment", "exact"),
    "optimizer v_codes": Term("1 byte for each element of the share: second moment in 8 bits", "exact"),
    "optimizer v_floor": Term("2 bytes for each 64 elements: floor of the second moment", "exact"),
    "optimizer v_levels": Term(
        "1 byte for each 64 elements: levels in an octave of the second moment", "exact"
    ),
    "optimizer remainder": Term(
        "2 bytes for each bfloat16 element of the share: the rest of its fp32 master weight", "exact"
    ),
    "optimizer short_remainder": Term(
        "1 byte for each bfloat16 element of the share: 8 more bits of its master weight (diet)", "exact"
    ),
    "optimizer master": Term(
        "4 bytes for each bfloat16 element of the share: master weights in fp32", "exact"
    ),
    "exchange buffers": Term(
        "two buckets in flight from and for every peer, and 256 KiB for adding them", "exact"
    ),
    "MLX base": Term("64 KiB for rotary tables and scalars, and the masks that layers are given", "fitted"),
    "allocator margin": Term(
        "half a page of 16 KiB for every buffer and for every tensor that is small; none on a CPU",
        "unmeasured",
    ),
    "gathered root": Term(
        "embedding, final norm and head, whole from the first phase to the last but one", "exact"
    ),
    "gathered units": Term(
        "the layer in work and the next one on its way, whole, at stage 3; with the tail", "exact"
    ),
    "gradients": Term("4 or 2 bytes for each element of the share of the units that are complete", "exact"),
    "unit gradient sums": Term(
        "4 bytes for each element of a layer, where a cell has several micro-batches; copies for the wire",
        "exact",
    ),
    "one unit's gradients": Term(
        "one micro-batch's gradients of a layer that are there at that moment", "derived"
    ),
    "contributions in flight": Term("the layer before in the wire's dtype, being reduced", "exact"),
    "contributions kept whole": Term(
        "all layers in the wire's dtype until the backward's end, at stage 1", "exact"
    ),
    "root gradients": Term("sums and parts of head and embedding, in fp32 where they are added up", "exact"),
    "embedding gradients": Term(
        "fp32 sums of the embedding's gradients, of each cell: the rows that its tokens look up; adapters whole",
        "exact",
    ),
    "layer inputs": Term(
        "one hidden state for each layer that the backward reaches and micro-batch that passes, and the current ones",
        "exact",
    ),
    "fetched layer inputs": Term(
        "two hidden states: where inputs come from a file, that of the layer in work and the next one",
        "exact",
    ),
    "kept products": Term(
        "results of recomputed layers that stay from forward to backward, which then does not compute them",
        "exact",
    ),
    "one layer's forward": Term("what is alive at the worst moment of one layer's forward", "derived"),
    "one layer's recompute": Term(
        "what is alive at the worst moment of one layer's vjp for a micro-batch, with what MLX hands over ahead",
        "derived",
    ),
    "attention": Term(
        "scores alive at that moment, heads x rows x width^2 each: on a CPU and wherever a mask is an array",
        "derived",
    ),
    "logits chunk": Term("what is alive at the worst moment of a chunk's loss and its vjp", "derived"),
    "teacher's values": Term(
        "6 bytes for each of the teacher's tokens and 2 more, for each position of one micro-batch", "exact"
    ),
    "un-recomputed tail": Term(
        "what the layers that are not recomputed keep for their backward, with the logits of a chunk",
        "derived",
    ),
    "tail gradients": Term("gradients of un-recomputed layers that are there at that moment", "derived"),
    "tail sums": Term(
        "4 bytes for each element of the un-recomputed layers, over a cell's micro-batches", "exact"
    ),
    "tail totals before rounding": Term(
        "2 more bytes for each element of the tail's share until the last round", "exact"
    ),
    "norm of gradients": Term(
        "squares of the largest unit's gradients, at most 2^22 of them, and their sums by halves", "exact"
    ),
    "optimizer chunk": Term("new states and temporaries of a chunk of at most 2^21 elements", "fitted"),
    "new weights of a unit": Term(
        "new weights until the old buffer goes, or the whole unit has been renewed", "exact"
    ),
}
UNKNOWN = Term("not described", "unmeasured")


def term(name: str, *, derived: bool = True) -> Term:
    """What `name` stands for in a ledger; `derived`: whether the model's layers could be traced (`Ledger.derived`)."""
    found = _TERMS.get(name, UNKNOWN)
    return found if derived or found.known != "derived" else found._replace(known="fitted")


@dataclass(frozen=True)
class Group:
    """What stands for a group: `key` in style sheets, `title` in words, `letter` without colours, `colour` on a
    terminal."""

    key: str
    title: str
    letter: str
    colour: str


GROUPS = (
    Group("weights", "weights", "W", "bright_blue"),
    Group("optimizer", "optimizer", "O", "magenta"),
    Group("gradients", "gradients", "G", "cyan"),
    Group("gathered", "gathered units", "U", "blue"),
    Group("adapters", "adapters", "D", "bright_magenta"),
    Group("activations", "activations", "A", "bright_cyan"),
    Group("logits", "logits", "L", "yellow"),
    Group("other", "buffers and margin", "B", "white"),
)

# Words of a name -> its group.
_RULES = (
    ("adapter", "adapters"),
    ("gathered", "gathered"),
    ("new weights", "gathered"),
    ("gradient", "gradients"),
    ("contribution", "gradients"),
    ("totals before rounding", "gradients"),
    ("sums", "gradients"),
    ("optimizer", "optimizer"),
    ("logits", "logits"),
    ("teacher", "logits"),
    ("weights", "weights"),
    ("layer", "activations"),
    ("kept products", "activations"),
    ("recompute", "activations"),
    ("attention", "activations"),
    ("tail", "activations"),
)


def group_of(name: str) -> str:
    """The key of the group that a ledger's name belongs to."""
    lowered = name.lower().replace("-", " ")
    return next((key for word, key in _RULES if word in lowered), "other")


def grouped(ledger: Mapping[str, int]) -> dict[str, int]:
    """Bytes by group's key, in the order of GROUPS, groups of zero bytes left out; the sum is the ledger's."""
    sums = {group.key: 0 for group in GROUPS}
    for name, size in ledger.items():
        sums[group_of(name)] += size
    return {key: size for key, size in sums.items() if size}


@dataclass(frozen=True)
class Line:
    """One name of the ledger: its size on each kind of node, how well it is known, and its formula in words."""

    name: str
    sizes: tuple[str, ...]
    mark: str
    formula: str


def entries(node: NodeAssessment) -> dict[str, int]:
    """What fills a node's memory at the worst moment, by name, in bytes; what is zero is left out."""
    return {name: size for name, size in node.ledger.items().items() if size}


def ledger_lines(nodes: Sequence[NodeAssessment]) -> tuple[str, list[tuple[str, NodeAssessment]], list[Line]]:
    """(unit, kinds of nodes, lines) of the nodes' ledgers; the last line is the peak."""
    kinds = alike(nodes)
    unit, name = (GIB, "GiB") if max(node.peak_bytes for node in nodes) >= 10 * GIB else (MIB, "MiB")
    ledgers = [entries(node) for _, node in kinds]
    lines = []
    for entry in dict.fromkeys(entry for ledger in ledgers for entry in ledger):
        sizes = tuple(_figure(ledger.get(entry, 0), unit) for ledger in ledgers)
        described = term(entry, derived=kinds[0][1].ledger.derived)
        lines.append(Line(entry, sizes, described.known, described.formula))
    peaks = tuple(_figure(node.peak_bytes, unit) for _, node in kinds)
    return name, kinds, [*lines, Line("peak", peaks, "", "")]


def _figure(size: int, unit: int) -> str:
    """Bytes in the table's unit; with a smaller one of their own where that would show a zero."""
    return amount(size) if 0 < size < unit / 100 else f"{size / unit:.2f}"


def alike(nodes: Sequence[NodeAssessment]) -> list[tuple[str, NodeAssessment]]:
    """The kinds of nodes, as (names in short, the first of them)."""
    return [(short_names([node.node.name for node in group]), group[0]) for group in kinds_of(nodes)]


def kinds_of(nodes: Sequence[NodeAssessment]) -> list[list[NodeAssessment]]:
    """Nodes with the same memory and limit that need the same, to a thousandth of it, together."""
    found: dict[tuple[int, int, int], list[NodeAssessment]] = {}
    for node in nodes:
        limit = node.limit_bytes
        part = round(1000 * node.peak_bytes / max(limit, 1))
        found.setdefault((node.node.memory_bytes, limit, part), []).append(node)
    return list(found.values())


def short_names(names: Sequence[str]) -> str:
    """The first of several names, and how many there are besides."""
    return names[0] if len(names) == 1 else f"{names[0]} +{len(names) - 1}"
