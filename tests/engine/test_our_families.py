"""The families with a model file of our own: the whole model's loss and gradients, on two ranks as on one.

Packed documents and rows that attend by pattern are among the settings; ALiBi's rows attend by their masks.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from support.mpi import run_ranks

NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}
REFINED_WEB = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "falcon": {"family": "falcon", "width": 12},
    "falcon, new decoder, by pattern": {
        "family": "falcon",
        "config": {**NEW, "num_hidden_layers": 2},
        "width": 300,
        "by_pattern": True,
        "packed": True,
    },
    "falcon, ALiBi, packed": {"family": "falcon", "config": REFINED_WEB, "width": 32, "packed": True},
    "olmo, clipped": {"family": "olmo", "tied": True, "config": {"clip_qkv": 0.1}, "width": 12},
}


@cache
def reports(ranks: int) -> list[dict[str, Any]]:
    """By rank what each setting came to."""
    fixed = {"rows": 1, "micro_batches": 2, "cells": 2, "shares": [2, 1]}
    cases = {name: {**fixed, **case, "compare": ranks == 2} for name, case in SETTINGS.items()}
    return run_ranks(ranks, "tests/engine/worker.py", [json.dumps(cases)], timeout=300)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_has_the_whole_models_loss_and_gradients(name: str) -> None:
    found = reports(2)[0][name]
    assert found["loss_error"] <= 1e-5
    assert found["norm_error"] <= 1e-5


@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_come_to_the_bits_of_one(name: str) -> None:
    first, second = reports(2)
    (alone,) = reports(1)
    for part in ("losses", "norms", "gradients", "weights"):
        assert first[name][part] == second[name][part] == alone[name][part]
