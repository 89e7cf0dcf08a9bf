"""Documents with every case that a page or a table must show, with hostile names, and figures made up for it."""

from __future__ import annotations

from typing import Any

GIB = 2**30
HOSTILE = '<img src=x onerror=alert(1)>&"'
CLUSTERS = ["1K+3S", "2K+2S", "3K+1S", "4K"]


def node(
    name: str, role: str | None, memory: int, limit: int, verdict: str, **gibibytes: float
) -> dict[str, Any]:
    """A node's document; `gibibytes` is its ledger."""
    ledger = {key.replace("_", " "): int(size * GIB) for key, size in gibibytes.items()}
    peak = sum(ledger.values())
    return {
        "name": name,
        "role": role,
        "memory_bytes": memory * GIB,
        "limit_bytes": limit * GIB,
        "share": 0.25,
        "ledger": ledger,
        "phase": "backward",
        "peak_bytes": peak,
        "headroom_bytes": limit * GIB - peak,
        "largest_array_bytes": 3 * GIB,
        "buffer_limit_bytes": 3 * limit * GIB // 4,
        "live_buffers": 21_000,
        "verdict": verdict,
        "reason": "" if verdict == "fits" else f"{name} is short of memory",
    }


def report() -> dict[str, Any]:
    """A node that fits, one that is tight, one that does not fit and one with a hostile name."""
    nodes = [
        node("king", "king", 512, 464, "fits", weights=100, optimizer_m=150, gradients=90, gathered_units=12),
        node(
            "soldier-1", "soldier", 256, 208, "tight", weights=60, optimizer_m=90, gradients=50, attention=5
        ),
        node(
            "soldier-2", "soldier", 256, 208, "no", weights=60, optimizer_m=90, gradients=50, logits_chunk=30
        ),
        node(HOSTILE, None, 128, 96, "fits", weights=20, adapters=5, MLX_base=1),
    ]
    times = [time("10 GbE", "network", 2.0), time("TCP over Thunderbolt", "compute", 1.0)]
    return {
        "model": {
            "name": f"scout {HOSTILE}",
            "parameters": 107_769_861_120,
            "trainable_parameters": 107_769_000_000,
            "active_parameters": 17_172_894_720,
            "family": "llama4",
            "dtype": "bfloat16",
            "not_trainable": f"no {HOSTILE} here",
        },
        "setting": "full tuning · 32 x 4,096 tokens a step",
        "verdict": "no",
        "reason": "soldier-2: needs 230 GiB and may use 208 GiB",
        "zero_stage": 3,
        "nodes": nodes,
        "time": times[0],
        "times": times,
        "cloud": "8 x H100 would take 3-5 hours",
        "advice": [
            {"change": "memory.shares=memory", "effect": "soldiers need 167 GiB", "verdict": "fits"},
            {"change": f"sudo {HOSTILE}", "effect": "raises the limit", "verdict": "tight"},
        ],
        "formulas": {"weights": {"formula": "2 bytes a parameter", "mark": "exact"}},
        "notes": ["M3 Ultra: 5-12 TFLOP/s"],
    }


def time(wire: str, bound: str, factor: float) -> dict[str, Any]:
    """A wire's document."""
    return {
        "wire": wire,
        "built": True,
        "step_seconds": [50.0 * factor, 120.0 * factor],
        "timeline": {
            "seconds": 50.0 * factor,
            "lanes": [
                {
                    "node": HOSTILE,
                    "lane": "compute",
                    "spans": [["forward", 0.0, 10.0], ["backward", 12.0, 40.0]],
                },
                {
                    "node": HOSTILE,
                    "lane": "network",
                    "spans": [["gather", 0.0, 9.0], ["reduce", 20.0, 50.0 * factor]],
                },
            ],
        },
        "positions_per_second": [1092.0 / factor, 2621.0 / factor],
        "run_hours": [14.0 * factor, 33.0 * factor],
        "energy_kwh": [15.0, 36.0],
        "ends": ["2026-11-22T10:00", "2026-11-23T08:00"],
        "bound": bound,
        "parts": {"compute": [50.0, 120.0], "network": [100.0, 100.0]},
    }


def matrix() -> dict[str, Any]:
    """Two models, one of them not trainable; each verdict occurs, once against the pooled arithmetic."""
    cells = {
        "1K+3S": ("no", -1.4, "fits"),
        "2K+2S": ("tight", 0.03, "tight"),
        "3K+1S": ("fits", 0.2, "fits"),
        "4K": ("fits", 0.9, "fits"),
    }
    rows = [
        {
            "model": model,
            "parameters": 179_522_035_712,
            "active_parameters": 179_522_035_712,
            "not_trainable": barred,
            "cells": {
                name: {"verdict": verdict, "zero_stage": 3, "headroom": headroom, "pooled_says": pooled}
                for name, (verdict, headroom, pooled) in cells.items()
            },
        }
        for model, barred in ((HOSTILE, None), ("falcon-180b", f"mlx-lm has no {HOSTILE}"))
    ]
    difference = {
        "model": HOSTILE,
        "cluster": "4K",
        "file_says": "NO",
        "verdict": "fits",
        "why": f"{HOSTILE}, so it fits",
    }
    return {"clusters": CLUSTERS, "rows": rows, "same": 7, "unknown": ["x"], "differences": [difference]}


def ladder() -> dict[str, Any]:
    """Three rungs: far too large, just too large, and fitting."""
    rungs = [
        {
            "name": name,
            "verdict": verdict,
            "zero_stage": 3,
            "nodes": [
                {"name": "king", "peak_bytes": peak * GIB, "limit_bytes": 464 * GIB, "verdict": verdict},
                {
                    "name": "soldier",
                    "peak_bytes": peak * GIB // 2,
                    "limit_bytes": 208 * GIB,
                    "verdict": verdict,
                },
            ],
            "dense": {"model": "llama-2-13b", "parameters": 13_015_864_320} if dense else None,
            "moe": None,
        }
        for name, peak, verdict, dense in (
            ("pure", 4000, "no", True),
            (f"+ {HOSTILE}", 480, "no", True),
            ("+ another", 300, "fits", False),
        )
    ]
    return {"model": "scout", "rungs": rungs}


def daughters() -> dict[str, Any]:
    """One way of training on one machine, served and placed."""
    run = {
        "way": "QLoRA, 4-bit base",
        "node": HOSTILE,
        "peak_bytes": 89 * GIB,
        "limit_bytes": 208 * GIB,
        "verdict": "fits",
        "positions_per_second": [46.7, 112.0],
        "run_hours": [1.5, 3.6],
        "dollars": None,
    }
    served = {
        "way": "QLoRA, 4-bit base",
        "node": HOSTILE,
        "weight_bytes": 56 * GIB,
        "adapter_bytes": GIB // 5,
        "cache_bytes": GIB // 3,
        "copies": 3,
        "daughters": 242,
        "load_seconds": [10.0, 20.0],
    }
    home = {"name": HOSTILE, "models": ["1", "2"], "used_bytes": 57 * GIB, "limit_bytes": 208 * GIB}
    placement = {"way": "QLoRA, 4-bit base", "shared_base": True, "nodes": [home], "homeless": []}
    return {
        "model": "scout",
        "not_trainable": "mlx-lm has no lora",
        "training": [run],
        "serving": [served],
        "count": 2,
        "placements": [placement],
    }
