"""Plans of large models, which no test holds in memory: Scout as the recipe asks for it, and published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oracle.plans import summary

from mlx_empire.cluster.hostfile import Node, load_hostfile
from mlx_empire.model import catalog
from mlx_empire.model.build import build_model, describe
from mlx_empire.optim.adamw import AdamW
from mlx_empire.plan.memory import ledger
from mlx_empire.plan.resolve import resolve
from mlx_empire.plan.shards import make_plan
from mlx_empire.plan.step_traffic import step_traffic
from mlx_empire.plan.workload import Workload, cell_layout
from mlx_empire.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
# model, shares, stage, rows a step, cells, un-recomputed layers, in backward
MODELS = (
    ("llama-4-scout-109b", (0.42, 0.2, 0.2, 0.18), 3, 32, "auto", 0, False),
    ("llama-4-scout-109b", (0.42, 0.2, 0.2, 0.18), 3, 128, "auto", 0, True),
    ("llama-4-scout-109b", (0.42, 0.2, 0.2, 0.18), 2, 32, 16, 4, False),
    ("llama-3.1-8b", (1.0,), 0, 8, "auto", 32, False),
    ("llama-3.1-8b", (2.0, 1.0), 1, 9, 4, 3, False),
    ("llama-3.1-70b", (2.0, 1.0, 1.0), 3, 24, 6, 0, True),
    ("mixtral-8x22b", (2.0, 1.0, 1.0, 1.0), 3, 16, "auto", 2, False),
    ("gemma-2-9b", (1.0, 1.0), 2, 8, "auto", 0, False),
    ("phi-3-medium-14b", (1.0, 1.0), 3, 4, "auto", 40, False),
    ("deepseek-v3-671b", (4.0, 1.0, 1.0, 1.0), 3, 16, "auto", 0, False),
)


def model_plans() -> dict[str, Any]:
    """Traffic and ledgers by a name of each."""
    found = {}
    for name, shares, stage, rows, cells, tail, release in MODELS:
        config, _ = catalog.load(name)
        spec = describe(build_model(config, name), config, name, "bfloat16")
        layout = cell_layout(rows, 1, cells, len(shares))
        work = Workload(1, 4096, layout, tail, "bfloat16", "auto", 4 << 20, release)
        plan, state_bytes = make_plan(spec.units, shares, stage), AdamW(state_bits=8).state_bytes
        key = f"{name} stage {stage} rows {rows} cells {cells} tail {tail} release {release}"
        ledgers = [summary(ledger(spec, plan, work, r, state_bytes)) for r in range(len(shares))]
        found[key] = {"traffic": step_traffic(plan, work), "ledgers": ledgers}
    return found | {"recipes/scout.yaml": scout()}


def scout() -> dict[str, Any]:
    """What the recipe and the empire of the README resolve to."""
    recipe = load_recipe(ROOT / "recipes/scout.yaml", [])
    hosts = load_hostfile(ROOT / "hosts/empire.txt").nodes
    nodes = [Node(h.name, h.slots, h.role, h.memory_bytes or 0, h.limit_bytes or 0) for h in hosts]
    config, _ = catalog.load(recipe.model.architecture)
    spec = describe(build_model(config, "scout"), config, "scout", "bfloat16")
    plan = resolve(recipe, spec, nodes, AdamW(state_bits=8).state_bytes)
    return {
        "stage": plan.shards.zero_stage,
        "shares": list(plan.shards.shares),
        "gradient_dtype": plan.work.gradient_dtype,
        "tail": plan.work.unrecomputed,
        "traffic": step_traffic(plan.shards, plan.work),
        "ledgers": [summary(one) for one in plan.ledgers],
    }
