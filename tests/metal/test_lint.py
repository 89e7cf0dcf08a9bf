"""Every node that a training step evaluates has its kernel in MLX's wheels for macOS, and no stream waits for another.

Nothing here runs on a GPU: a step's graphs are watched on their way into MLX's evaluation (`support/watch.cpp`), and
held against the kernels that the wheels bring. Of all families every day a few; all settings in `make test-slow`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from metal.rules import complaints
from metal.settings import DAILY, SETTINGS
from support.watching import Kind, library, watched

WORKER = Path(__file__).with_name("worker.py")
PARTS = [pytest.param(True, id="daily"), pytest.param(False, id="all", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def steps(request):
    """By setting what loading and each of two steps evaluated; `gpu` is the stream that plays the GPU."""
    built = library(request.config.cache.mkdir("watch"))

    @cache
    def seen(daily: bool) -> dict[str, Any]:
        names = [name for name in SETTINGS if (name in DAILY) == daily]
        found: dict[str, Any] = {}
        for line in watched(built, [str(WORKER), json.dumps(names)], timeout=900).splitlines():
            found |= json.loads(line)
        assert set(found) == {*names, "gpu"}
        return found

    return seen


def on_gpu(found: dict[str, Any]) -> set[Kind]:
    """The kinds of nodes that were evaluated on the GPU's stream, over all settings."""
    gpu = found["gpu"]
    listed = [
        kind for name, parts in found.items() if name != "gpu" for part in parts for kind in part["kinds"]
    ]
    kinds = [
        Kind(**{**kind, "inputs": tuple(kind["inputs"]), "outputs": tuple(kind["outputs"])})
        for kind in listed
    ]
    return {kind for kind in kinds if kind.stream == gpu}


@pytest.mark.parametrize("daily", PARTS)
def test_every_node_has_a_kernel_on_macos(steps, daily):
    kinds = on_gpu(steps(daily))
    assert len(kinds) > 200, "the watch saw steps"
    assert sorted({complaint for kind in kinds for complaint in complaints(kind)}) == []


@pytest.mark.parametrize("daily", PARTS)
def test_the_gpu_waits_for_nothing_within_an_evaluation(steps, daily):
    """A command buffer that waits some seconds for the CPU or the disk is killed by macOS."""
    found = steps(daily)
    gpu = f"@{found.pop('gpu')}"
    waits = {
        f"{name}: {node} waits for {source}"
        for name, parts in found.items()
        for part in parts
        for node, source in part["waits"]
        if node.endswith(gpu)
    }
    assert sorted(waits) == []
