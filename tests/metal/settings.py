"""What is looked at for Metal: a step of each family, tuning, kind of master weight and optimizer."""

from __future__ import annotations

from support.stepping import Case
from support.tiny_models import FAMILIES, MIXTURES, OTHER_FAMILIES
from support.tuning import TunedCase

SMALL = {"micro_batches": 2, "rows": 2, "width": 32, "state_bits": 8}
LONG = {**SMALL, "micro_batches": 1, "rows": 1, "width": 400, "packed": True, "by_pattern": True}
# Families of mlx-lm beside those of the tests: other norms, gates, rotary parts, convolutions, scans and routers.
MORE_FAMILIES = (
    "apertus",
    "ernie4_5",
    "exaone4",
    "glm4",
    "glm4_moe",
    "granite",
    "granitemoe",
    "helium",
    "hunyuan_v1_dense",
    "lfm2",
    "mimo",
    "ministral3",
    "nemotron_h",
    "olmo3",
    "olmoe",
    "qwen3_next",
    "seed_oss",
    "smollm3",
    "stablelm",
)
_DENSE = [name for name in (*FAMILIES, *OTHER_FAMILIES) if name not in MIXTURES]

SETTINGS: dict[str, Case] = {
    **{name: Case(name, **SMALL) for name in (*FAMILIES, *OTHER_FAMILIES, *MORE_FAMILIES)},
    **{f"{name} bfloat16": Case(name, dtype="bfloat16", **SMALL) for name in _DENSE},
    **{
        f"{optimizer} {masters}": Case(optimizer=optimizer, master_weights=masters, dtype="bfloat16", **SMALL)
        for optimizer in ("adamw", "lion", "sgd")
        for masters in ("exact", "diet", "none", "fp32")
        if (optimizer, masters) != ("adamw", "exact")
    },
    "32-bit states": Case(**{**SMALL, "state_bits": 32}),
    "stage 0": Case(stage=0, **SMALL),
    "stage 1, bfloat16 gradients": Case(stage=1, dtype="bfloat16", gradient_dtype="bfloat16", **SMALL),
    "two cells": Case(stage=2, cells=2, **SMALL),
    "packed": Case(packed=True, **SMALL),
    "in blocks": Case("gpt_oss", **LONG),
    "in blocks, bfloat16": Case(dtype="bfloat16", **LONG),
    "un-recomputed": Case(tail=2, **SMALL),
    "gradient release": Case(release=True, dtype="bfloat16", **SMALL),
    "lora": TunedCase(tuning={"type": "lora", "dropout": 0.1}, **SMALL),
    "lora bfloat16": TunedCase(dtype="bfloat16", **SMALL),
    "dora": TunedCase(tuning={"type": "dora"}, **SMALL),
    **{
        f"qlora {bits}": TunedCase(tuning={"type": "qlora", "bits": bits}, **SMALL)
        for bits in (4, 8, 3, "ternary", "mxfp4", "mxfp8", "nvfp4")
    },
    "experts lora": TunedCase("qwen3_moe", tuning={"type": "lora", "targets": ["experts"]}, **SMALL),
    "experts qlora": TunedCase("qwen3_moe", tuning={"type": "qlora"}, **SMALL),
}

# Those of every day; the others are in `make test-slow`.
DAILY = (
    "llama",
    "llama bfloat16",
    "gemma2",
    "qwen3_moe",
    "llama4",
    "deepseek_v3",
    "gpt_oss",
    "mamba2",
    "lion diet",
    "sgd none",
    "two cells",
    "packed",
    "in blocks",
    "lora",
    "dora",
    "qlora 4",
    "experts qlora",
)
