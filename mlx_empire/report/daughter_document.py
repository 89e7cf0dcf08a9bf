"""Decides what is said about daughters: as plain JSON, and as the tables that terminal and page share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_empire.cluster.hostfile import Node
from mlx_empire.plan.daughters import DaughterRun, Model, Placement, Serving, place
from mlx_empire.report.text import amount, run_length, span

Document = dict[str, Any]
Table = tuple[str, list[str], list[list[str]]]  # title, head, rows


def daughters_document(
    model: str,
    not_trainable: str | None,
    runs: Sequence[DaughterRun],
    served: Sequence[Serving],
    nodes: Sequence[Node],
    count: int,
) -> Document:
    """Training a daughter on each kind of node, serving her there, and where `count` of them would live."""
    ways = {one.way: one for one in served}
    return {
        "model": model,
        "not_trainable": not_trainable,
        "training": [_run(run) for run in runs],
        "serving": [
            {
                "way": one.way,
                "node": one.node.name,
                "weight_bytes": one.weight_bytes,
                "adapter_bytes": one.adapter_bytes,
                "cache_bytes": one.cache_bytes,
                "copies": one.copies,
                "daughters": one.daughters,
                "load_seconds": sorted(one.load_seconds),
            }
            for one in served
        ],
        "count": count,
        "placements": [
            _placement(way, shared, placed(one, nodes, count, shared=shared), nodes)
            for way, one in ways.items()
            for shared in (False, True)
        ],
    }


def placed(one: Serving, nodes: Sequence[Node], count: int, *, shared: bool) -> Placement:
    """`count` models with a conversation each: whole ones, or adapters over a base that a node loads once."""
    own = one.cache_bytes + (one.adapter_bytes if shared else one.weight_bytes)
    base = "base" if shared else None
    models = [Model(f"{i + 1}", own, base) for i in range(count)]
    return place(models, nodes, {"base": one.weight_bytes})


def _run(run: DaughterRun) -> Document:
    (node,) = run.assessment.nodes
    return {
        "way": run.way,
        "node": run.node.name,
        "trainable_parameters": run.assessment.spec.trainable_parameters,
        "peak_bytes": node.peak_bytes,
        "limit_bytes": node.limit_bytes,
        "headroom_bytes": node.headroom_bytes,
        "verdict": node.verdict,
        "step_seconds": sorted(run.pace.step_seconds),
        "positions_per_second": sorted(run.pace.positions_per_second),
        "tokens_per_second": sorted(run.pace.positions_per_second),  # its former name
        "run_hours": sorted(run.pace.run_hours),
        "energy_kwh": sorted(run.pace.energy_kwh),
        "dollars": None if run.dollars is None else sorted(run.dollars),
    }


def _placement(way: str, shared: bool, found: Placement, nodes: Sequence[Node]) -> Document:
    return {
        "way": way,
        "shared_base": shared,
        "nodes": [
            {"name": node.name, "models": list(homes), "used_bytes": used, "limit_bytes": node.limit_bytes}
            for node, homes, used in zip(nodes, found.homes, found.used_bytes, strict=True)
        ],
        "homeless": list(found.homeless),
    }


def daughter_tables(daughters: Mapping[str, Any]) -> list[Table]:
    """Training, serving and placement, each as a title, a head and rows of text."""
    training = [
        [
            run["way"],
            run["node"],
            f"{amount(run['peak_bytes'])} of {amount(run['limit_bytes'])}",
            run["verdict"],
            span(run["positions_per_second"]),
            run_length(run["run_hours"]),
            "?" if run["dollars"] is None else span(run["dollars"], " $"),
        ]
        for run in daughters["training"]
    ]
    serving = [
        [
            one["way"].replace("LoRA, ", "").replace("Q", ""),
            one["node"],
            amount(one["weight_bytes"]),
            amount(one["adapter_bytes"]),
            amount(one["cache_bytes"]),
            f"{one['copies']:,}",
            f"{one['daughters']:,}",
            span(one["load_seconds"], " s"),
        ]
        for one in daughters["serving"]
    ]
    names = [node["name"] for node in daughters["placements"][0]["nodes"]]
    placements = [
        [
            one["way"].replace("LoRA, ", "").replace("Q", ""),
            "adapters over one base" if one["shared_base"] else "whole models",
            *(_home(node) for node in one["nodes"]),
            str(len(one["homeless"])),
        ]
        for one in daughters["placements"]
    ]
    return [
        (
            f"training a daughter of {daughters['model']} on one machine",
            ["way", "machine", "memory", "verdict", "positions/s", "run", "cost"],
            training,
        ),
        (
            "serving",
            ["weights", "machine", "base", "adapter", "cache", "whole models", "daughters", "load"],
            serving,
        ),
        (
            f"where {daughters['count']} of them would live",
            ["weights", "as", *names, "without a place"],
            placements,
        ),
    ]


def _home(node: Mapping[str, Any]) -> str:
    count = len(node["models"])
    return f"{count}, {amount(node['used_bytes'])}" if count else "-"
