"""Daughters: adapters of one model, trained on single machines and served beside each other.

Decides which ways of training are compared (LoRA on the base as it is, QLoRA on 8 and 4 bits), what a run of each
costs (power, and the machine's price spread over three years), and how many models of a kind a machine holds for
serving: whole copies with their caches, or daughters that share one base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_empire.cluster.hostfile import Node
from mlx_empire.cluster.machine import Calibration
from mlx_empire.model.spec import ModelSpec
from mlx_empire.plan.assess import Assessment, assess
from mlx_empire.plan.chips import Range, chip_of, no_time
from mlx_empire.plan.federation import adapters_held, fitting_models, swap_seconds
from mlx_empire.plan.hardware import WIRES
from mlx_empire.plan.lengths import DataSize
from mlx_empire.plan.optimizer_bytes import StatesOf
from mlx_empire.plan.pace import Pace, pace_of, run_dollars
from mlx_empire.plan.serving import cache_bytes_per_token, resting_bytes, serving_room
from mlx_empire.recipe.changes import variant
from mlx_empire.recipe.schema import Recipe

DEFAULT_RANK = 16

LORA, QLORA8, QLORA4 = "LoRA, base as it is", "QLoRA, 8-bit base", "QLoRA, 4-bit base"
WAYS: Mapping[str, Mapping[str, Any]] = {
    LORA: {"tuning.type": "lora", "tuning.bits": None},
    QLORA8: {"tuning.type": "qlora", "tuning.bits": 8},
    QLORA4: {"tuning.type": "qlora", "tuning.bits": 4},
}


@dataclass(frozen=True)
class DaughterRun:
    """One way of training a daughter on one node alone; `pace` is None where the node's chip is not known, `dollars`
    where the machine's price is not."""

    way: str
    node: Node
    assessment: Assessment
    pace: Pace | None
    dollars: Range | None


@dataclass(frozen=True)
class Serving:
    """How many of a model one node holds. Sizes in bytes; `cache_bytes` of one conversation at the given length.

    `copies`: whole models, each with a cache. `daughters`: adapters over one shared base, each with a cache; 0 where
    not even the base fits. `load_seconds`: of one whole model from the SSD, None where the chip is not known.
    """

    way: str
    node: Node
    weight_bytes: int
    adapter_bytes: int
    cache_bytes: int
    copies: int
    daughters: int
    load_seconds: Range | None


@dataclass(frozen=True)
class ServedModel:
    """Something to be placed: its own bytes, and the base that it shares with others on the same node (or None)."""

    name: str
    own_bytes: int
    base: str | None = None


@dataclass(frozen=True)
class DaughterPlacement:
    """Which node holds which models (names, in the nodes' order), bytes used per node, and what found no place."""

    homes: tuple[tuple[str, ...], ...]
    used_bytes: tuple[int, ...]
    homeless: tuple[str, ...]


def daughter_runs(
    recipe: Recipe,
    specs: Mapping[str, ModelSpec],
    nodes: Sequence[Node],
    states_of: StatesOf,
    calibration: Calibration | None = None,
    size: DataSize | None = None,
) -> list[DaughterRun]:
    """Every way of training on every kind of node, one node at a time, with the recipe's batch, data and length.

    `specs`: by way, the model as `tuned_in` tunes it.
    """
    found = []
    for way in WAYS:
        tuning = tuned_in(recipe, way)
        for node in kinds(nodes):
            alone = assess(tuning, specs[way], [node], states_of)
            known = no_time([node], calibration) is None
            pace = pace_of(alone, WIRES[0], None, calibration, size) if known else None
            found.append(DaughterRun(way, node, alone, pace, run_dollars([node], pace) if pace else None))
    return found


def serving(
    recipe: Recipe,
    specs: Mapping[str, ModelSpec],
    nodes: Sequence[Node],
    context: int | None = None,
    calibration: Calibration | None = None,
) -> list[Serving]:
    """How many models each kind of node holds, with conversations of `context` positions (default: the recipe's rows).

    `specs`: by way, the model as `tuned_in` tunes it.
    """
    length = context or recipe.data.sequence_length
    found = []
    for way in WAYS:
        spec = specs[way]
        weights, adapter = resting_bytes(spec, trained=False), resting_bytes(spec, trained=True)
        cache = length * cache_bytes_per_token(spec)
        for node in kinds(nodes):
            room = serving_room(node.limit_bytes)
            chip = chip_of(node, calibration)
            found.append(
                Serving(
                    way,
                    node,
                    weights,
                    adapter,
                    cache,
                    fitting_models(weights, cache, room),
                    adapters_held(weights, adapter, cache, room),
                    swap_seconds(weights, chip.disk_rate if chip else None),
                )
            )
    return found


def place_daughters(
    models: Sequence[ServedModel], nodes: Sequence[Node], bases: Mapping[str, int] | None = None
) -> DaughterPlacement:
    """Spread `models` over `nodes`, never past 95 % of a limit; a base (`bases`: bytes by name) loads once per node.

    Largest first, each to the node that is then least full; where that leaves some without a place, each to the
    fullest node that still takes it, and the better of the two.
    """
    known = dict(bases or {})
    assert all(m.base is None or m.base in known for m in models), "every base needs its size"
    balanced = _place(models, nodes, known, fullest=False)
    if not balanced.homeless:
        return balanced
    packed = _place(models, nodes, known, fullest=True)
    return packed if len(packed.homeless) < len(balanced.homeless) else balanced


def kinds(nodes: Sequence[Node]) -> list[Node]:
    """One node of each kind, in order: those with the same memory, limit and chip are alike."""
    found: dict[tuple[int, int, str | None], Node] = {}
    for node in nodes:
        found.setdefault((node.memory_bytes, node.limit_bytes, node.chip), node)
    return list(found.values())


def _place(
    models: Sequence[ServedModel], nodes: Sequence[Node], bases: Mapping[str, int], *, fullest: bool
) -> DaughterPlacement:
    limits = [serving_room(n.limit_bytes) for n in nodes]
    used, homes, homeless = [0] * len(nodes), [list[str]() for _ in nodes], []
    loaded: list[set[str]] = [set() for _ in nodes]

    def cost(model: ServedModel, i: int) -> int:
        if model.base is None or model.base in loaded[i]:
            return model.own_bytes
        return model.own_bytes + bases[model.base]

    for model in sorted(models, key=lambda m: -(m.own_bytes + bases.get(m.base or "", 0))):
        open_to = [i for i in range(len(nodes)) if used[i] + cost(model, i) <= limits[i]]
        if not open_to:
            homeless.append(model.name)
            continue
        filled = {i: (used[i] + cost(model, i)) / limits[i] for i in open_to}
        chosen = max(open_to, key=filled.__getitem__) if fullest else min(open_to, key=filled.__getitem__)
        used[chosen] += cost(model, chosen)
        homes[chosen].append(model.name)
        if model.base is not None:
            loaded[chosen].add(model.base)
    return DaughterPlacement(tuple(map(tuple, homes)), tuple(used), tuple(homeless))


def tuned_in(recipe: Recipe, way: str) -> Recipe:
    """The recipe of a daughter that is trained in one of the ways, with adapters of the recipe's rank."""
    rank = recipe.tuning.rank or DEFAULT_RANK
    return variant(recipe, {**WAYS[way], "tuning.rank": rank})
