"""A step whose main thread runs ahead of the device gives, to the last bit, what one gives that waits for each layer.

What the waiting one gives is held against whole models and the oracle elsewhere.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from oracle.settings import SETTINGS
from support.mpi import run_ranks

DAILY = (
    *(
        f"llama stage {stage} tail {tail} cells 4{tied}"
        for stage, tail, tied in ((0, 2, " tied"), (1, 0, ""), (3, 0, ""))
    ),
    "llama stage 3 in backward 8 bits",
    "qwen3_moe stage 2 lora",
)
LAUNCHES = [
    *(pytest.param(ranks, DAILY, id=f"{ranks} daily") for ranks in (1, 2)),
    *(pytest.param(ranks, tuple(SETTINGS), id=f"{ranks} all", marks=pytest.mark.slow) for ranks in (1, 2, 3)),
]


@cache
def bits(ranks: int, names: tuple[str, ...]) -> dict[str, list[Any]]:
    """By setting what the waiting step gives, and the one that runs ahead."""
    words = [json.dumps(word) for word in ("run_ahead", {}, names)]
    found: dict[str, list[Any]] = run_ranks(ranks, "tests/engine/switch_worker.py", words, timeout=1500)[0]
    return found


@pytest.mark.parametrize(("ranks", "names"), LAUNCHES)
def test_running_ahead_changes_no_bit(ranks, names):
    found = bits(ranks, names)
    assert found.keys() == set(names)
    for name, (waiting, ahead) in found.items():
        assert ahead == waiting, name
