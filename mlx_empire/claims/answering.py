"""What is asked about models that only answer: their size, how many of them a machine holds, and loading one.

They lie at 16 bits, and hold one conversation each (`assumed.at_rest`).
"""

from __future__ import annotations

from mlx_empire.claims.assumed import at_rest
from mlx_empire.claims.judge import Ours, gb
from mlx_empire.cluster.hostfile import default_limit
from mlx_empire.plan.chips import GIGA, chip_named
from mlx_empire.plan.federation import adapters_held, fitting_models, link_seconds, swap_seconds
from mlx_empire.plan.hardware import WIRES
from mlx_empire.plan.pace import spell
from mlx_empire.plan.serving import PACKED, USABLE, serving_room
from mlx_empire.sizes import GIB


def served(model: str, context: int, count: int = 1) -> Ours:
    weights, cache, _ = at_rest(model, context)
    each = f"weights {gb(weights)}" + (f" + cache {gb(cache)}" if cache else "")
    return Ours(count * (weights + cache) / GIGA, f"{count} x ({each})" if count > 1 else each)


def models_held(model: str, gb: float, context: int) -> Ours:
    weights, cache, adapter = at_rest(model, context)
    limit = default_limit(int(gb * GIB))
    room = serving_room(limit)
    packed = fitting_models(int(PACKED * weights), cache, room)
    return Ours(
        float(fitting_models(weights, cache, room)),
        f"{USABLE:.0%} of the {limit / GIGA:.1f} GB that the GPU may use / {(weights + cache) / GIGA:.1f} GB each; "
        f"in 4 bits {packed}, as adapters over one base {adapters_held(weights, adapter, cache, room)}",
    )


def least_memory(model: str, context: int) -> Ours:
    weights, cache, _ = at_rest(model, context)
    size = next(
        size
        for size in range(1, 1024)
        if fitting_models(weights, cache, serving_room(default_limit(size * GIB)))
    )
    return Ours(float(size), f"{(weights + cache) / GIGA:.1f} GB / {USABLE:g} / three quarters, in GiB")


def swap(model: str, chip: str) -> Ours:
    weights, _, _ = at_rest(model, 0)
    disk, wire = chip_named(chip).disk_rate, WIRES[0]
    own, over = swap_seconds(weights, disk), link_seconds(weights, disk, wire.rate)
    assert own is not None
    assert over is not None
    rate = spell((disk[0] / GIGA, disk[1] / GIGA))
    return Ours(own, f"{gb(weights)} / {rate} GB/s; over {wire.name} {spell(over)} seconds")
