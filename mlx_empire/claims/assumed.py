"""What stands for what a document leaves open.

That is `recipes/scout.yaml` with the model in question, on the empire's clusters as `hosts/` has them; rows of 2,048
positions for adapters, as S2 says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from mlx_empire.cluster.hostfile import Node, default_limit
from mlx_empire.cluster.machine import OWN_MEMORY_USABLE
from mlx_empire.model.target import catalog_target
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.assess import Assessment, assess
from mlx_empire.plan.chips import is_mac
from mlx_empire.plan.hardware import standard_clusters
from mlx_empire.plan.serving import cache_bytes_per_token, resting_bytes
from mlx_empire.recipe.changes import variant
from mlx_empire.recipe.duration import Duration
from mlx_empire.recipe.load import load_recipe
from mlx_empire.recipe.packaged import recipe_file
from mlx_empire.recipe.schema import Recipe
from mlx_empire.sizes import GIB

EMPIRE, SCOUT = "1K+3S", "llama-4-scout-109b"
Settings = dict[str, Any]
# The documents' techniques, one after the other, as keys of a recipe. All but ZeRO-2 with everything divided, which
# is what a sum over all machines means.
PURE: Settings = {
    "model.dtype": "float32",
    "memory.gradient_checkpointing": False,
    "memory.zero_stage": 3,
    "memory.gradient_dtype": "float32",
    "optimizer.state_bits": 32,
}
CHECKPOINTING: Settings = {"memory.gradient_checkpointing": True}
HALF: Settings = {"model.dtype": "bfloat16", "memory.gradient_dtype": "bfloat16"}
EIGHT_BIT: Settings = {"optimizer.state_bits": 8}
STAGE_2: Settings = {"memory.zero_stage": 2}
TECHNIQUES = {
    "pure": PURE,
    "checkpointing": PURE | CHECKPOINTING,
    "half": PURE | CHECKPOINTING | HALF,
    "pure-half": PURE | HALF,
    "all": PURE | CHECKPOINTING | HALF | EIGHT_BIT,
    "zero-2": PURE | CHECKPOINTING | HALF | EIGHT_BIT | STAGE_2,
    "product": {},  # as the recipe says: what is `auto` is chosen
}
ADAPTERS: Settings = {
    "tuning.type": "lora",
    "tuning.rank": 16,
    "tuning.targets": None,
    "data.sequence_length": 2048,
    "batch.global_size": 16,
    "optimizer.state_bits": 32,
}


@cache
def scout() -> Recipe:
    """The recipe that comes with the package."""
    return load_recipe(recipe_file("scout"))


def on(nodes: Sequence[Node], model: str, settings: Settings) -> Assessment:
    """The recipe with a catalog model and other settings, on nodes."""
    recipe = variant(scout(), settings)
    return assess(recipe, catalog_target(model, recipe).spec, nodes, state_bytes_of)


@cache
def planned(model: str, cluster: str, techniques: str) -> Assessment:
    """`on` a cluster of the empire."""
    return on(standard_clusters()[cluster], model, TECHNIQUES[techniques])


@cache
def on_one(model: str, gb: float, chip: str, kind: str, steps: int | None = None) -> Assessment:
    """`on` one machine or card of so many GB with adapters (`lora`, or `qlora` on 4 bits or `ternary`) or whole, in a
    run of so many steps (None: as many as the recipe says)."""
    settings: Settings = ADAPTERS | {"tuning.type": kind}
    if kind == "ternary":
        settings |= {"tuning.type": "qlora", "tuning.bits": "ternary"}
    if kind == "full":
        settings |= TECHNIQUES["all"] | {"tuning.rank": None, "memory.zero_stage": "auto"}
    if steps is not None:
        settings |= {"run.steps": Duration(steps)}
    return on([machine(gb, chip)], model, settings)


def machine(gb: float, chip: str) -> Node:
    """A machine or card of so many GB, with what its GPU may use unless somebody says otherwise."""
    memory = int(gb * GIB)
    node = Node("one", 1, None, memory, memory, None, chip, measured=False)
    limit = default_limit(memory) if is_mac(node) else int(OWN_MEMORY_USABLE * memory)
    return replace(node, limit_bytes=limit)


def at_rest(model: str, context: int) -> tuple[int, int, int]:
    """Bytes of a model's weights at 16 bits, of a conversation's cache, and of an adapter over those weights."""
    recipe = variant(scout(), ADAPTERS)
    spec = catalog_target(model, recipe).spec
    cache = context * cache_bytes_per_token(spec)
    return resting_bytes(spec, trained=False), cache, resting_bytes(spec, trained=True)
