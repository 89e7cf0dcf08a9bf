"""Decides how a person sees a memory ledger: its many names in a few groups with colours and letters, or line by line.

Names are matched by the words in them, first rule first, so a name that a ledger gains later falls into a fitting
group, or into the last one, and never out of the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_empire.report.text import GIB, MIB, alike


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


def ledger_lines(
    report: Mapping[str, Any],
) -> tuple[str, list[tuple[str, Mapping[str, Any]]], list[Line]]:
    """(unit, kinds of nodes, lines) of a report's ledgers; the last line is the peak."""
    kinds = alike(report["nodes"])
    unit, name = memory_unit(report["nodes"])
    names = dict.fromkeys(entry for _, node in kinds for entry in node["ledger"])
    lines = []
    for entry in names:
        sizes = tuple(f"{node['ledger'].get(entry, 0) / unit:.2f}" for _, node in kinds)
        found = report["formulas"].get(entry, {})
        lines.append(Line(entry, sizes, found.get("mark", ""), found.get("formula", "")))
    peaks = tuple(f"{node['peak_bytes'] / unit:.2f}" for _, node in kinds)
    return name, kinds, [*lines, Line("peak", peaks, "", "")]


def memory_unit(nodes: Sequence[Mapping[str, Any]]) -> tuple[int, str]:
    """(bytes, name) of the unit in which the ledgers of these nodes are readable."""
    return (GIB, "GiB") if max(node["peak_bytes"] for node in nodes) >= 10 * GIB else (MIB, "MiB")
