"""Decides what is said about daughters: the tables that terminal and page share, and the JSON (`--json`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mlx_empire.capacity.daughters import (
    DaughterPlacement,
    DaughterRun,
    ServedModel,
    Serving,
    place_daughters,
)
from mlx_empire.capacity.document import Document
from mlx_empire.cluster.hostfile import Node
from mlx_empire.report.text import run_length, span
from mlx_empire.sizes import amount

Table = tuple[str, list[str], list[list[str]]]  # title, head, rows


@dataclass(frozen=True)
class Placed:
    """Where daughters of one way would live: as whole models, or as adapters over a base that a node loads once."""

    way: str
    shared_base: bool
    placement: DaughterPlacement


@dataclass(frozen=True)
class DaughterSurvey:
    """Training a daughter on each kind of node, serving it there, and where `count` of them would live on `nodes`.

    `not_trainable`: one sentence why the trainer here cannot train them, or None.
    """

    model: str
    not_trainable: str | None
    runs: Sequence[DaughterRun]
    served: Sequence[Serving]
    nodes: Sequence[Node]
    count: int

    @cached_property
    def placements(self) -> list[Placed]:
        """Every way of serving, as whole models and over a shared base, each model with a conversation."""
        found = []
        for one in {one.way: one for one in self.served}.values():
            for shared, own in ((False, one.weight_bytes), (True, one.adapter_bytes)):
                base = "base" if shared else None
                models = [ServedModel(f"{i + 1}", one.cache_bytes + own, base) for i in range(self.count)]
                placement = place_daughters(models, self.nodes, {"base": one.weight_bytes})
                found.append(Placed(one.way, shared, placement))
        return found


def daughters_document(daughters: DaughterSurvey) -> Document:
    """The survey as JSON."""
    return {
        "model": daughters.model,
        "not_trainable": daughters.not_trainable,
        "training": [_run(run) for run in daughters.runs],
        "serving": [
            {
                "way": one.way,
                "node": one.node.name,
                "weight_bytes": one.weight_bytes,
                "adapter_bytes": one.adapter_bytes,
                "cache_bytes": one.cache_bytes,
                "copies": one.copies,
                "daughters": one.daughters,
                "load_seconds": one.load_seconds and sorted(one.load_seconds),
            }
            for one in daughters.served
        ],
        "count": daughters.count,
        "placements": [
            {
                "way": one.way,
                "shared_base": one.shared_base,
                "nodes": [
                    {"name": n.name, "models": list(homes), "used_bytes": used, "limit_bytes": n.limit_bytes}
                    for n, homes, used in zip(
                        daughters.nodes, one.placement.homes, one.placement.used_bytes, strict=True
                    )
                ],
                "homeless": list(one.placement.homeless),
            }
            for one in daughters.placements
        ],
    }


def _run(run: DaughterRun) -> Document:
    (node,) = run.assessment.nodes
    pace = run.pace
    return {
        "way": run.way,
        "node": run.node.name,
        "trainable_parameters": run.assessment.spec.trainable_parameters,
        "peak_bytes": node.peak_bytes,
        "limit_bytes": node.limit_bytes,
        "headroom_bytes": node.headroom_bytes,
        "verdict": node.verdict,
        "step_seconds": pace and sorted(pace.step_seconds),
        "positions_per_second": pace and sorted(pace.positions_per_second),
        "tokens_per_second": pace and sorted(pace.positions_per_second),  # its former name
        "run_hours": pace and sorted(pace.run_hours),
        "energy_kwh": pace and pace.energy_kwh and sorted(pace.energy_kwh),
        "dollars": None if run.dollars is None else sorted(run.dollars),
    }


def daughter_tables(daughters: DaughterSurvey) -> list[Table]:
    """Training, serving and placement, each as a title, a head and rows of text."""
    return [
        (
            f"training a daughter of {daughters.model} on one machine",
            ["way", "machine", "memory", "verdict", "positions/s", "run", "cost"],
            [_training(run) for run in daughters.runs],
        ),
        (
            "serving",
            ["weights", "machine", "base", "adapter", "cache", "whole models", "daughters", "load"],
            [_serving(one) for one in daughters.served],
        ),
        (
            f"where {daughters.count} of them would live",
            ["weights", "as", *(node.name for node in daughters.nodes), "without a place"],
            [_placement(one) for one in daughters.placements],
        ),
    ]


def _training(run: DaughterRun) -> list[str]:
    (node,) = run.assessment.nodes
    return [
        run.way,
        run.node.name,
        f"{amount(node.peak_bytes)} of {amount(node.limit_bytes)}",
        node.verdict,
        span(run.pace.positions_per_second) if run.pace else "?",
        run_length(run.pace.run_hours) if run.pace else "unknown chip",
        "?" if run.dollars is None else span(run.dollars, " $"),
    ]


def _serving(one: Serving) -> list[str]:
    return [
        _weights(one.way),
        one.node.name,
        amount(one.weight_bytes),
        amount(one.adapter_bytes),
        amount(one.cache_bytes),
        f"{one.copies:,}",
        f"{one.daughters:,}",
        span(one.load_seconds, " s") if one.load_seconds else "?",
    ]


def _placement(one: Placed) -> list[str]:
    found = one.placement
    return [
        _weights(one.way),
        "adapters over one base" if one.shared_base else "whole models",
        *(
            f"{len(homes)} in {amount(used)}" if homes else "-"
            for homes, used in zip(found.homes, found.used_bytes, strict=True)
        ),
        str(len(found.homeless)),
    ]


def _weights(way: str) -> str:
    """What of a way counts where nothing is trained: how the base is stored."""
    return way.replace("LoRA, ", "").replace("Q", "")
