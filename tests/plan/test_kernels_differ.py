"""Stage 0 computes every update on every rank, so it needs GPUs and systems whose kernels are the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.planning import llama_like, nodes_of, recipe_of

from mlx_empire.cluster.hostfile import Node
from mlx_empire.errors import UserError
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan import resolve as resolving
from mlx_empire.plan.node_kernels import kernels_differ
from mlx_empire.plan.resolve import resolve
from mlx_empire.plan.shares import RunPlan

M3, M4 = "applegpu_g15d under macOS 15.5", "applegpu_g16s under macOS 15.5"
NEWER = "applegpu_g15d under macOS 26.1"


def nodes(*compiles: str | None) -> list[Node]:
    return [
        replace(n, compiles=c) for n, c in zip(nodes_of([1 << 40] * len(compiles)), compiles, strict=True)
    ]


def plan(stage: object, *compiles: str | None) -> RunPlan:
    recipe = recipe_of(f"memory.zero_stage={stage}")
    return resolve(recipe, llama_like(), nodes(*compiles), state_bytes_of(recipe.optimizer))


@pytest.mark.parametrize("other", [M4, NEWER], ids=["another chip", "another macOS"])
def test_stage_0_is_refused_where_gpus_or_systems_differ(other: str) -> None:
    assert plan(0, M3, M3).shards.zero_stage == 0
    assert plan(0, None, None).shards.zero_stage == 0
    with pytest.raises(
        UserError, match=r"memory\.zero_stage: 0: .*node-0: applegpu_g15d under macOS 15\.5"
    ) as refused:
        plan(0, M3, other)
    assert other in str(refused.value)
    assert "\n" not in str(refused.value)
    assert plan(1, M3, other).shards.zero_stage == 1


def test_auto_never_comes_to_stage_0_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolving, "STAGES", (0, 3))
    monkeypatch.setattr(resolving, "_busiest_card", lambda plan: 0)  # so that the first stage is taken
    assert plan("auto", M3, M3).shards.zero_stage == 0
    assert plan("auto", M3, M4).shards.zero_stage == 3


def test_what_differs_is_named_by_machine() -> None:
    assert kernels_differ(nodes(M3, M3, None)) == ""
    assert kernels_differ(nodes(M3, M3, M4)) == f"node-0: {M3}, node-2: {M4}"
