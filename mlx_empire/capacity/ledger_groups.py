"""Decides how a person sees a memory ledger: its many names in a few groups with colours and letters, or line by line.

Names are matched by the words in them, first rule first, so a name that a ledger gains later falls into a fitting
group, or into the last one, and never out of the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlx_empire.plan.assess import NodeAssessment
from mlx_empire.plan.terms import term
from mlx_empire.report.text import GIB, MIB


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
    ("dora", "adapters"),
    ("gathered", "gathered"),
    ("new weights", "gathered"),
    ("gradient", "gradients"),
    ("contribution", "gradients"),
    ("totals before rounding", "gradients"),
    ("sums", "gradients"),
    ("optimizer", "optimizer"),
    ("logits", "logits"),
    ("weights", "weights"),
    ("layer", "activations"),
    ("recompute", "activations"),
    ("attention", "activations"),
    ("tail", "activations"),
    ("scan", "activations"),
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
        sizes = tuple(f"{ledger.get(entry, 0) / unit:.2f}" for ledger in ledgers)
        lines.append(Line(entry, sizes, term(entry).known, term(entry).formula))
    peaks = tuple(f"{node.peak_bytes / unit:.2f}" for _, node in kinds)
    return name, kinds, [*lines, Line("peak", peaks, "", "")]


def alike(nodes: Sequence[NodeAssessment]) -> list[tuple[str, NodeAssessment]]:
    """Nodes with the same limit that need the same, to a thousandth of it, as (their names, the first of them)."""
    found: dict[tuple[int, int], list[NodeAssessment]] = {}
    for node in nodes:
        limit = node.limit_bytes
        found.setdefault((limit, round(1000 * node.peak_bytes / max(limit, 1))), []).append(node)
    return [(_names([node.node.name for node in group]), group[0]) for group in found.values()]


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} +{len(names) - 1}"
