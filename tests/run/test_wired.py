"""How much a Mac wires: the rule, and what MLX is asked for. Metal is played by the test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from support.planning import llama_like, recipe_of

from mlx_empire.cluster.hostfile import Node
from mlx_empire.errors import UserError
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.resolve import resolve
from mlx_empire.plan.wired_limit import wired_bytes
from mlx_empire.run import trainer
from mlx_empire.sizes import amount

GIB = 2**30
KING = Node("king", 1, "king", 512 * GIB, 384 * GIB, None, "Apple M3 Ultra")
RAISED = replace(KING, limit_bytes=464 * GIB)
SMALL = Node("air", 1, None, 16 * GIB, 12 * GIB, None, "Apple M3")


@pytest.mark.parametrize(
    ("asked", "peak", "node", "wired"),
    [
        ("off", 380 * GIB, KING, 0),
        ("auto", 192 * GIB, KING, 0),  # half of it: nothing is gained
        ("auto", 193 * GIB, KING, 384 * GIB),
        ("auto", 399 * GIB, RAISED, 512 * GIB - 512 * GIB // 10),  # a tenth stays free
        ("auto", 463 * GIB, RAISED, 0),
        ("auto", 7 * GIB, SMALL, 8 * GIB),  # 8 GiB stay free
        ("auto", 9 * GIB, SMALL, 0),
        (3 * GIB, 1, SMALL, 3 * GIB),
    ],
)
def test_the_rule(asked: Any, peak: int, node: Node, wired: int) -> None:
    found, why = wired_bytes(asked, peak, node)
    assert abs(found - wired) <= 1
    assert why.startswith("auto: " if asked == "auto" else "memory.wired")


def test_more_than_the_machine_lends_is_refused_with_the_command_that_raises_it() -> None:
    with pytest.raises(
        UserError, match=r"memory\.wired: 13958643712: air may use .*iogpu\.wired_limit_mb=13312"
    ):
        wired_bytes(13 * GIB, 1, SMALL)


@pytest.mark.parametrize(("asked", "wired"), [("auto", 0), ("off", 0), (2 * GIB, 2 * GIB)])
def test_metal_is_asked_for_it_and_no_other_device(
    asked: Any, wired: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of()
    plan = resolve(recipe, llama_like(), [SMALL], state_bytes_of(recipe.optimizer))
    calls: list[int] = []
    for name in ("set_memory_limit", "set_cache_limit"):
        monkeypatch.setattr(mx, name, lambda size: None)
    monkeypatch.setattr(mx, "set_wired_limit", calls.append)
    assert trainer.limit_memory(plan, 0, asked, SMALL) is None
    assert calls == []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(trainer, "computes_on_gpu", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12 * GIB})
    said = trainer.limit_memory(plan, 0, asked, SMALL)
    assert calls == [wired]
    assert said is not None
    assert said.startswith(f"air: {amount(wired)} of memory wired (")


@pytest.mark.parametrize(("mac", "wired"), [(14, 0), (15, 2 * GIB), (26, 2 * GIB), (None, 2 * GIB)])
def test_a_macos_that_cannot_wire_says_so(
    mac: int | None, wired: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of()
    plan = resolve(recipe, llama_like(), [SMALL], state_bytes_of(recipe.optimizer))
    calls: list[int] = []
    for name in ("set_memory_limit", "set_cache_limit"):
        monkeypatch.setattr(mx, name, lambda size: None)
    monkeypatch.setattr(mx, "set_wired_limit", calls.append)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(trainer, "computes_on_gpu", lambda: True)
    monkeypatch.setattr(trainer, "macos_version", lambda: mac)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12 * GIB})
    said = trainer.limit_memory(plan, 0, 2 * GIB, SMALL)
    assert calls == [wired]
    assert ("macOS 14 cannot" in str(said)) == (mac == 14)
