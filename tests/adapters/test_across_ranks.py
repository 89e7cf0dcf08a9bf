"""Adapters on one and on two ranks, base sharded (stage 3) or whole (stage 2, 0): the same bits, compared with ==."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from support.mpi import run_ranks

EXPERTS = {"type": "qlora", "rank": 2, "targets": ["q_proj", "experts"]}
GROUPS = {
    **{
        f"{family} {kind}": (family, {"type": kind})
        for family in ("llama", "qwen3_moe")
        for kind in ("lora", "dora")
    },
    "llama dropout": ("llama", {"type": "lora", "dropout": 0.2}),
    "llama qlora 3": ("llama", {"type": "qlora", "bits": 3}),
    "llama4 qlora experts": ("llama4", EXPERTS),
    "llama 8 bit states, two layers": ("llama", {"type": "lora", "layers": 2, "rank": 64}),
}
STAGES = (0, 2, 3)


def cases() -> dict[str, dict[str, Any]]:
    common = {"shares": [2, 1], "cells": 2, "micro_batches": 4, "steps": 3, "learning_rate": 1e-3}
    return {
        f"{group}:{stage}": {
            **common,
            "family": family,
            "tuning": tuning,
            "stage": stage,
            "tail": stage,
            "state_bits": 8 if "8 bit" in group else 32,
            "tied": family == "llama",
        }
        for group, (family, tuning) in GROUPS.items()
        for stage in STAGES
        if stage or group == "llama lora"
    }


@cache
def reports(ranks: int) -> list[dict[str, Any]]:
    return run_ranks(ranks, "tests/adapters/worker.py", [json.dumps(cases())])


@pytest.mark.parametrize("group", GROUPS)
def test_same_bits_on_one_and_two_ranks_at_any_stage(group):
    found = [
        {key: one[f"{group}:{stage}"][key] for key in ("losses", "norms", "weights")}
        for ranks in (1, 2)
        for one in reports(ranks)
        for stage in STAGES
        if f"{group}:{stage}" in one
    ]
    assert all(one == found[0] for one in found)
    assert found[0]["losses"][-1] != found[0]["losses"][0]


def test_bytes_moved_are_the_planned_ones():
    for rank, one in enumerate(reports(2)):
        for name, case in one.items():
            assert case["moved"] == case["planned"], (name, rank)


def test_a_base_that_stays_whole_is_never_moved():
    """At stage 2 only adapters travel: less than they weigh three times, where the sharded base takes far more."""
    one = reports(2)[0]
    assert sum(one["llama lora:2"]["moved"]) * 3 < sum(one["llama lora:3"]["moved"])
