"""What to change: the cheapest change that makes a plan fit, or what a plan that fits could do better.

Decides the order in which changes are tried, cheapest first: settings that cost nothing (weighted shares, ZeRO stage,
checkpointing, 8-bit states, smaller micro-batches), settings that change the training (shorter masters, released
gradients, shorter sequences with accumulation, fewer sequences a step, adapters alone), a raised GPU limit, another
machine, more memory in each, a rented one. Only what the trainer can do
today is advised, and every setting is written so that it can be typed. Whatever is advised was assessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from mlx_empire.capacity.improve import PaceOf, faster, larger
from mlx_empire.capacity.whatif import Advice as Advice
from mlx_empire.capacity.whatif import (
    Settings,
    fits,
    fits_at_least,
    fullest_node,
    hopeless,
    with_least_memory,
    with_settings,
)
from mlx_empire.cluster.hostfile import Node
from mlx_empire.cluster.machine import Calibration
from mlx_empire.model.spec import ITEM_BYTES, ModelSpec
from mlx_empire.plan.assess import Assessment, assess
from mlx_empire.plan.chips import Chip, is_mac, no_time
from mlx_empire.plan.hardware import KING, SOLDIER, Machine, Wire, wire_of
from mlx_empire.plan.lengths import DataSize, Lengths
from mlx_empire.plan.pace import Pace, cloud_of, pace_of, spell
from mlx_empire.plan.resolve import never_fits, usable
from mlx_empire.plan.wired_limit import FORGETS, most_raised, raising
from mlx_empire.recipe.changes import adapters_of, typed, value, variant
from mlx_empire.recipe.schema import Recipe
from mlx_empire.sizes import GIB

MOST_NEW_MACHINES = 4
SHORTEST_SEQUENCE = 256
ADAPTERS: Sequence[Settings] = ({"tuning.type": "lora"}, {"tuning.type": "qlora", "tuning.bits": 4})

Retuned = Callable[[Recipe], ModelSpec]


def advise(
    assessment: Assessment,
    wire: Wire | None = None,
    chips: Sequence[Chip] | None = None,
    calibration: Calibration | None = None,
    retuned: Retuned | None = None,
) -> list[Advice]:
    """Advice, best first. `wire` None: what the hostfile says; `chips`, one per node, None: what the nodes are.

    `retuned`: describes the model as a changed recipe tunes it; without it nothing is said of adapters. With a verdict
    `no`: what makes it fit, cheapest first. Else: what is faster (where the chips are known), what is larger, and for
    `tight` what gives room.
    """
    wire = wire_of([n.node for n in assessment.nodes]) if wire is None else wire

    def pace(one: Assessment, over: Wire = wire) -> Pace:
        return pace_of(one, over, chips, calibration)

    known = chips is not None or no_time([n.node for n in assessment.nodes], calibration) is None
    if assessment.verdict == "no":
        return _until_it_fits(assessment, pace if known else None, retuned)
    found = [*(faster(assessment, pace) if known else ()), *larger(assessment)]
    return [*found, *_raised(assessment, {})] if assessment.verdict == "tight" else found


def _until_it_fits(assessment: Assessment, pace: PaceOf | None, retuned: Retuned | None) -> list[Advice]:
    """The cheapest settings that suffice; unless they are free, also adapters and each kind of hardware that does."""
    free = dict(_free_settings(assessment.recipe))
    each = [{name: setting} for name, setting in free.items()]
    settings = _fewest(assessment, each)
    if settings:
        return [_by_settings(assessment, settings)]
    each += [
        settings
        for settings in (_diet(assessment), _release(assessment.recipe), _offload(assessment.recipe))
        if settings
    ]
    settings = _fewest(assessment, each)
    if settings is None and (costly := _costly_settings(assessment, _together(each))):
        settings = _fewest(assessment, [*each, costly])
    found = [_by_settings(assessment, settings)] if settings else _adapters_alone(assessment, free, retuned)
    found += _raised(assessment, free)
    machines = _more_machines(assessment, free)
    found += machines
    if not settings:
        found += [] if machines else _more_memory(assessment, free)
        found.append(_cloud(assessment, pace))
    return found


def _free_settings(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Settings that change no result worth speaking of, in the order in which they are tried."""
    memory = recipe.memory
    if memory.shares != "memory":
        yield "memory.shares", "memory"
    if memory.zero_stage != "auto":
        yield "memory.zero_stage", "auto"
    if memory.gradient_checkpointing is False:
        yield "memory.gradient_checkpointing", True
    if recipe.optimizer.state_bits != 8:
        yield "optimizer.state_bits", 8
    if memory.gradient_dtype == "float32":
        yield "memory.gradient_dtype", "auto"
    if recipe.batch.micro_size > 1:
        yield "batch.micro_size", 1


def _diet(assessment: Assessment) -> Settings:
    """A master weight of 24 bits where it has 32: a byte per parameter less, and a little less exact."""
    full = assessment.recipe.optimizer.master_weights in ("exact", "fp32")
    return {"optimizer.master_weights": "diet"} if full and assessment.spec.dtype == "bfloat16" else {}


def _release(recipe: Recipe) -> Settings:
    """Gradients that are not kept: a unit is updated in the backward, clipped by the norm of the step before."""
    skips = recipe.dynamic_loss_scale or recipe.numerics.spikes in ("skip", "rollback")
    return {} if skips or recipe.optimizer.in_backward else {"optimizer.in_backward": True}


def _offload(recipe: Recipe) -> Settings:
    """Layers' inputs in a file: the same bits, and much that is written."""
    return {} if recipe.memory.activation_offload is True else {"memory.activation_offload": True}


def _adapters_alone(assessment: Assessment, free: Settings, retuned: Retuned | None) -> list[Advice]:
    """Adapters in the place of the whole model, on its own weights or on packed ones; nothing where none fit."""
    if retuned is None or assessment.recipe.tuning.type != "full":
        return []
    nodes = [n.node for n in assessment.nodes]
    for settings in (adapters_of(assessment.recipe, one) for one in ADAPTERS):
        if _frozen_bytes(assessment.spec, settings) > usable(nodes):
            continue  # said without describing the model anew
        changed = variant(assessment.recipe, {**settings, **free})
        spec = retuned(changed)
        if never_fits(spec, nodes, assessment.states_of(changed.optimizer)):
            continue
        other = assess(changed, spec, nodes, assessment.states_of)
        if fits(other):
            effect = f"adapters only, the model itself stays as it is; {fullest_node(other)}"
            return [Advice(_resolved({**settings, **free}, other), effect, other.verdict)]
    return []


def _frozen_bytes(spec: ModelSpec, settings: Settings) -> int:
    """The least that the weights of a model that is trained whole take below adapters."""
    packed = settings.get("tuning.bits")
    if packed:
        return spec.base_parameters * int(packed) // 8
    return sum(t.size * ITEM_BYTES[t.dtype] for unit in spec.units for t in unit.tensors)


def _costly_settings(assessment: Assessment, free: Settings) -> Settings:
    """The longest shorter sequence that fits with `free` (as many positions a step), else fewer sequences, else {}."""
    recipe = assessment.recipe
    length, size = recipe.data.sequence_length, recipe.batch.global_size
    while length // 2 >= SHORTEST_SEQUENCE:
        length, size = length // 2, size * 2
        changes = {"data.sequence_length": length, "batch.global_size": size}
        if fits_at_least(assessment, {**free, **changes}):
            return changes
    least = max(len(assessment.nodes), value(variant(recipe, free), "batch.micro_size"))
    size = recipe.batch.global_size
    while size // 2 >= least and size % 2 == 0:
        size //= 2
        if fits_at_least(assessment, {**free, "batch.global_size": size}):
            return {"batch.global_size": size}
    return {}


def _fewest(assessment: Assessment, ordered: Sequence[Settings]) -> Settings | None:
    """The fewest of `ordered` that make it fit: taken in order until it does, then those left out that can be."""
    taken: list[Settings] = []
    for settings in ordered:
        taken.append(settings)
        if _can(assessment, _together(taken)):
            break
    else:
        return None
    idle: Settings | None = {}
    while idle is not None:
        fewer = ((one, [s for s in taken if s is not one]) for one in taken[:-1])
        idle = next((one for one, others in fewer if _can(assessment, _together(others))), None)
        taken = [one for one in taken if one is not idle]
    return _together(taken)


def _can(assessment: Assessment, settings: Settings) -> bool:
    """Whether it fits so. Stage 3 needs least but for models of few layers, so where it fails `auto` is asked."""
    if hopeless(assessment, settings):
        return False
    return fits(with_least_memory(assessment, settings)) or fits(with_settings(assessment, settings))


def _together(parts: Sequence[Settings]) -> Settings:
    return {name: setting for part in parts for name, setting in part.items()}


def _by_settings(assessment: Assessment, settings: Settings) -> Advice:
    better = with_settings(assessment, settings)
    return Advice(_resolved(settings, better), fullest_node(better), better.verdict)


def _resolved(settings: Settings, better: Assessment) -> str:
    """The settings as typed, with the stage that `auto` came to."""
    shown = dict(settings)
    if "memory.zero_stage" in shown:
        shown["memory.zero_stage"] = better.zero_stage
    return typed(shown)


def _raised(assessment: Assessment, free: Settings) -> list[Advice]:
    """A higher GPU limit where it is missing (`no`) or scarce (`tight`); nothing where that does not help."""
    nodes = [n.node for n in assessment.nodes]
    more = [most_raised(node) for node in nodes]
    changed = [n for n, old in zip(more, nodes, strict=True) if n != old]
    if not changed or not fits_at_least(assessment, free, more):
        return []
    better = with_settings(assessment, free, more)
    if better.verdict == assessment.verdict:
        return []
    commands = []
    for size in sorted({n.limit_bytes for n in changed}, reverse=True):
        names = ", ".join(n.name for n in changed if n.limit_bytes == size)
        commands.append(f"{raising(size)} on {names} (in the hostfile limit={size // GIB}GiB)")
    change = "; ".join([*commands, *([_resolved(free, better)] if free else [])])
    return [Advice(change, f"{fullest_node(better)}; {FORGETS}", better.verdict)]


def _more_machines(assessment: Assessment, free: Settings) -> list[Advice]:
    """The fewest further soldiers, and kings, that make it fit; for other machines, copies of the largest."""
    nodes = [n.node for n in assessment.nodes]
    if not is_mac(nodes[0]):
        largest = max(nodes, key=lambda n: n.limit_bytes)
        return _added(
            assessment, free, lambda i: replace(largest, name=f"{largest.name}-{i}"), "machine like this"
        )
    found: list[Advice] = []
    for machine in (SOLDIER, KING):
        name = f"{machine.role} ({machine.memory_bytes // GIB} GB)"
        found += _added(assessment, free, _maker(machine), name, machine.dollars)
    return found


def _more_memory(assessment: Assessment, free: Settings) -> list[Advice]:
    """How many times the memory these machines would need; nothing where memory is not what is missing."""

    def attempt(tenths: int) -> Assessment:
        grown = [_times(n.node, tenths / 10) for n in assessment.nodes]
        return with_least_memory(assessment, free, grown)

    now = with_least_memory(assessment, free)
    low, high = 10, math.ceil(10 * max(n.peak_bytes / max(n.limit_bytes, 1) for n in now.nodes))
    if not fits(attempt(high)):
        return []
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(attempt(middle)) else (middle, high)
    better = attempt(high)
    settings = f"; {_resolved(free, better)}" if free else ""
    return [
        Advice(f"machines with {high / 10:.1f} x the memory{settings}", fullest_node(better), better.verdict)
    ]


def _times(node: Node, factor: float) -> Node:
    memory, limit = int(node.memory_bytes * factor), int(node.limit_bytes * factor)
    return replace(node, memory_bytes=memory, limit_bytes=limit)


def _maker(machine: Machine) -> Callable[[int], Node]:
    return lambda i: machine.node(f"new-{machine.role}-{i}")


def _added(
    assessment: Assessment, free: Settings, make: Callable[[int], Node], name: str, dollars: int | None = None
) -> list[Advice]:
    nodes = [n.node for n in assessment.nodes]
    for count in range(1, MOST_NEW_MACHINES + 1):
        more = [*nodes, *(make(i + 1) for i in range(count))]
        if fits_at_least(assessment, free, more):
            better = with_settings(assessment, free, more)
            change = f"{count} more {name}" if count > 1 else f"another {name}"
            cost = f"; {count * dollars:,} dollars" if dollars else ""
            settings = f"; {_resolved(free, better)}" if free else ""
            return [Advice(change + settings, fullest_node(better) + cost, better.verdict)]
    return []


def _cloud(assessment: Assessment, pace: PaceOf | None) -> Advice:
    recipe = assessment.recipe
    lengths = Lengths.of(recipe, DataSize.assumed(recipe))
    cloud = cloud_of(assessment, lengths, pace(assessment) if pace else None)
    effect = f"{spell(cloud.hours)} hours and {spell(cloud.dollars)} dollars on rented machines"
    return Advice(f"a cloud burst on {cloud.gpus} x H100", effect, "fits")
