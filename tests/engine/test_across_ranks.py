"""One result on any number of ranks, at any stage, with any shares; and that result is the whole model's.

Real mpirun with 1 and 2 ranks; in `make test-slow` with 3 and 4 too, and with families at stages 1 and 2 (every day the
oracle's settings run on 3). Every case has the same four cells everywhere, so the reference (whole-model gradients
added in cell order) is the same too, and all comparisons are ==.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from typing import Any

import pytest
from support.mpi import run_ranks
from support.tiny_models import FAMILIES

SHARES = {1: [1], 2: [2, 1], 3: [1, 3, 2], 4: [2, 1, 1, 1]}
EQUAL_SHARES = [1]

# Ten micro-batches in four cells: neither divides the other, nor do three ranks divide four cells.
COMMON = {"micro_batches": 10, "cells": 4, "rows": 2, "width": 32, "compare": True}
OPTIMIZERS = (
    *(("adamw", bits, master) for bits in (8, 32) for master in ("diet", "fp32", "none")),
    *((name, bits, "exact") for name in ("lion", "sgd") for bits in (8, 32)),
    ("lion", 8, "diet"),
)


def cases(ranks: int) -> dict[str, dict[str, Any]]:
    """Settings that must agree across ranks within each group (the part of the name before the colon)."""
    made: dict[str, dict[str, Any]] = {}
    for i, family in enumerate(FAMILIES):
        for stage in (0, 1, 2, 3):
            unequal = (i + stage) % 2 == 0
            made[f"{family}:stage {stage}"] = {
                **COMMON,
                "family": family,
                "stage": stage,
                "shares": SHARES[ranks] if unequal else EQUAL_SHARES,
                "tail": (0, 2, 4, 1)[stage],
            }
    for family in ("llama", "qwen3", "qwen3_moe"):
        for stage, tail in ((3, 0), (2, 4), (3, 3)):
            made[f"{family} tied:stage {stage} tail {tail}"] = {
                **COMMON,
                "family": family,
                "tied": True,
                "stage": stage,
                "tail": tail,
                "shares": SHARES[ranks],
            }
    for stage, route in ((3, "relay"), (3, "direct"), (1, "auto")):
        made[f"steps:stage {stage} {route}"] = {
            **COMMON,
            "family": "llama",
            "tied": True,
            "stage": stage,
            "route": route,
            "shares": SHARES[ranks],
            "steps": 4,
            "learning_rate": 1e-3,
            "clip_norm": 0.5,
            "weight_decay": 0.1,
        }
    for stage in (2, 3):
        made[f"8 bit:stage {stage}"] = {**made["steps:stage 3 relay"], "stage": stage, "state_bits": 8}
        made[f"bfloat16:stage {stage}"] = {
            **made["steps:stage 3 relay"],
            "stage": stage,
            "dtype": "bfloat16",
            "gradient_dtype": "bfloat16",
            "compare": False,
            "steps": 2,
        }
    for stage in (0, 3):  # the first steps overflow, and the scale falls and grows again
        made[f"float16:stage {stage}"] = {
            **made["steps:stage 3 relay"],
            "stage": stage,
            "dtype": "float16",
            "loss_scale": 2.0**21,
            "scale_window": 2,
            "compare": False,
            "steps": 6,
        }
    for stage, wave, tail in ((2, 1, 0), (0, 2, 3)):  # cells of 2 and 3 micro-batches
        made[f"steps:stage {stage} waves of {wave}"] = {
            **made["steps:stage 3 relay"],
            "stage": stage,
            "wave": wave,
            "tail": tail,
            "run_ahead": stage == 0,
            "kept": 0.0 if stage == 0 else 1.0,
        }
    for stage, more in (  # layers' inputs in a file
        (0, {"tail": 2}),
        (1, {}),
        (2, {"wave": 1, "kept": 1.0}),
        (3, {"kept": 0.4}),
    ):
        made[f"steps:stage {stage}, inputs in a file"] = {
            **made["steps:stage 3 relay"],
            **more,
            "stage": stage,
            "offload": True,
        }
    made["bfloat16:stage 3, inputs in a file"] = {**made["bfloat16:stage 3"], "offload": True}
    small = {"micro_batches": 4, "rows": 1, "width": 16, "config": {"num_hidden_layers": 1}, "compare": False}
    step = {**made["steps:stage 3 relay"], **small, "steps": 3, "dtype": "bfloat16"}
    for name, bits, master in OPTIMIZERS:
        group = f"{name} {bits} bit {master}"
        for stage in (2, 3):
            kind = {"optimizer": name, "state_bits": bits, "master_weights": master, "stage": stage}
            made[f"{group}:stage {stage}"] = {**step, **kind}
    for stage, tail in ((0, 0), (1, 2), (2, 0), (3, 4)):
        made[f"released:stage {stage}"] = {
            **made["steps:stage 3 relay"],
            "stage": stage,
            "tail": tail,
            "release": True,
            "compare": False,
        }
    for stage, tail in ((3, 0), (0, 4)):
        made[f"taught:stage {stage}"] = {
            **COMMON,
            "taught": True,
            "tied": True,
            "stage": stage,
            "tail": tail,
            "shares": SHARES[ranks],
        }
    made["packed:stage 3"] = {**COMMON, "packed": True, "shares": SHARES[ranks]}
    made["packed:stage 0"] = {**COMMON, "packed": True, "stage": 0, "tail": 3}
    made["packed gemma2:stage 3"] = {**COMMON, "packed": True, "family": "gemma2", "shares": SHARES[ranks]}
    return made


NAMES = list(cases(1))
GROUPS = sorted({name.split(":")[0] for name in NAMES})
DAILY = [name for name in NAMES if not name.endswith((":stage 1", ":stage 2")) or name.startswith("llama")]
# Nothing travels on one rank, so a day's launch of one has the first case of each group.
ALONE = [next(name for name in DAILY if name.split(":")[0] == group) for group in GROUPS]
# How many ranks, and with which cases: some every day, all of them now and then.
LAUNCHES = [(1, "daily"), (2, "daily"), *((ranks, "all") for ranks in (1, 2, 3, 4))]


# The whole model's gradients, which the launches share.
REFERENCES = tempfile.TemporaryDirectory(prefix="references-")


@cache
def reports(ranks: int, which: str) -> list[dict[str, Any]]:
    """All ranks' reports of one launch with `ranks` ranks."""
    wanted = {name: case for name, case in cases(ranks).items() if name in names(ranks, which)}
    known = {"MLX_EMPIRE_TEST_REFERENCES": REFERENCES.name}
    return run_ranks(ranks, "tests/engine/worker.py", [json.dumps(wanted)], timeout=600, env=known)


def names(ranks: int, which: str) -> list[str]:
    """The cases of a launch."""
    if which == "all":
        return NAMES
    return ALONE if ranks == 1 else DAILY


def marked(which: str, *values: Any) -> Any:
    """A test's parameters, with the mark of what is too long for every day."""
    return pytest.param(*values, which, marks=() if which == "daily" else pytest.mark.slow)


@pytest.mark.parametrize(("sizes", "which"), [marked("daily", (1, 2)), marked("all", (1, 2, 3, 4))])
@pytest.mark.parametrize("group", GROUPS)
def test_same_bits_on_any_number_of_ranks_at_any_stage(group, sizes, which):
    found: dict[str, set[Any]] = {"gradients": set(), "weights": set(), "losses": set(), "norms": set()}
    for ranks in sizes:
        for one in reports(ranks, which):
            for name in names(ranks, which):
                if name.split(":")[0] == group:
                    found["gradients"].add(one[name]["gradients"])
                    found["weights"].add(one[name]["weights"])
                    found["losses"].add(tuple(one[name]["losses"]))
                    found["norms"].add(tuple(one[name]["norms"]))
    assert {key: len(values) for key, values in found.items()} == dict.fromkeys(found, 1)


@pytest.mark.parametrize(
    ("ranks", "name", "which"),
    [
        marked(which, ranks, name)
        for ranks, which in LAUNCHES
        for name in names(ranks, which)
        if cases(1)[name]["compare"]
    ],
)
def test_gradients_are_those_of_the_whole_model(ranks, name, which):
    one = reports(ranks, which)[0][name]
    assert one["loss_error"] <= 1e-6
    assert one["gradient_error"] <= 1e-5
    if not name.startswith("packed"):  # the packed reference runs documents one by one: other matrix shapes
        assert one["unequal"] == []


@pytest.mark.parametrize(("ranks", "which"), [marked(which, ranks) for ranks, which in LAUNCHES])
def test_bytes_moved_are_the_planned_ones(ranks, which):
    for name in names(ranks, which):
        for rank, one in enumerate(reports(ranks, which)):
            assert one[name]["moved"] == one[name]["planned"], (name, rank)
            assert (ranks == 1) == (sum(one[name]["moved"]) == 0), (name, rank)


def test_traffic_does_not_change_with_the_micro_batch():
    base = {"shares": [2, 1], "cells": 2, "steps": 1}
    both = {
        "large": {**base, "rows": 4, "micro_batches": 4},
        "halved": {**base, "rows": 2, "micro_batches": 8},
    }
    for one in run_ranks(2, "tests/engine/worker.py", [json.dumps(both)]):
        assert one["large"]["moved"] == one["halved"]["moved"]
        assert sum(one["large"]["moved"]) > 0
