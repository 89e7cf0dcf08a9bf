"""The settings of the oracle: every path of a training step, as small as it can be.

Names are unique and for good: the recording (`tests/fixtures/oracle.json.gz`) is keyed by them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

RANKS = (1, 2, 3, 4)
SHARES = [3.0, 1.0, 2.0, 1.0]  # cut to the number of ranks: unequal, the first rank the largest
SHAPE = {
    "micro_batches": 6,
    "rows": 2,
    "width": 24,
    "cells": 4,
    "shares": SHARES,
    "steps": 2,
    "learning_rate": 1e-3,
}
LOW = {"dtype": "bfloat16", "gradient_dtype": "bfloat16", "rows": 1, "width": 16, "micro_batches": 4}

MIXES = (
    # tail, cells, tied, micro-batches
    (0, 4, False, 6),
    (2, 4, True, 6),
    (1, 6, False, 6),
)
MORE_FAMILIES = (
    "deepseek_v3",
    "gpt_oss",
    "phi3",
    "gpt2",
    "mamba2",
    "gemma3_text",
    "mixtral",
    "olmo2",
    "cohere2",
)


def _full() -> Iterator[tuple[str, dict[str, Any]]]:
    for family in ("llama", "gemma2", "qwen3_moe", "llama4", "qwen3"):
        for stage in range(4):
            for tail, cells, tied, count in MIXES:
                name = f"{family} stage {stage} tail {tail} cells {cells}{' tied' if tied else ''}"
                mix = {"tail": tail, "cells": cells, "tied": tied, "micro_batches": count}
                yield name, {"family": family, "stage": stage, **mix}
    for number, family in enumerate(MORE_FAMILIES):
        for stage, tail in ((3, 0), (number % 3, 1 + number % 3)):
            yield f"{family} stage {stage} tail {tail}", {"family": family, "stage": stage, "tail": tail}
    for stage in range(4):
        yield f"llama stage {stage} packed", {"stage": stage, "packed": True, "tail": stage % 2}
        yield f"llama stage {stage} whole tail", {"stage": stage, "tail": 4}
        yield f"llama stage {stage} unclipped", {"stage": stage, "clip_norm": None, "weight_decay": 0.1}
        yield (
            f"llama stage {stage} in backward",
            {"stage": stage, "release": True, "tail": (0, 2, 0, 1)[stage]},
        )
        yield f"llama stage {stage} in backward 8 bits", {
            **LOW, "stage": stage, "release": True, "tail": (2, 0, 4, 0)[stage], "state_bits": 8,
        }  # fmt: skip
    for stage in (1, 3):
        for route in ("direct", "relay"):
            yield f"llama stage {stage} {route}", {"stage": stage, "route": route}
        yield f"llama stage {stage} a cell a rank", {"stage": stage, "cells": "auto"}
    for optimizer, bits, master in (
        ("adamw", 8, "exact"), ("adamw", 8, "diet"), ("adamw", 32, "fp32"), ("adamw", 8, "none"),
        ("lion", 8, "exact"), ("sgd", 32, "diet"),
    ):  # fmt: skip
        for stage in (2, 3):
            kind = {"optimizer": optimizer, "state_bits": bits, "master_weights": master, "stage": stage}
            yield f"llama stage {stage} bfloat16 {optimizer} {bits} bits {master}", {**LOW, **kind}


def _tuned() -> Iterator[tuple[str, dict[str, Any]]]:
    for stage in range(4):
        for kind in ("lora", "dora", "qlora"):
            yield f"llama stage {stage} {kind}", {"stage": stage, "tuning": {"type": kind}, "tail": stage % 2}
        yield f"llama stage {stage} lora in 2 layers", {
            "stage": stage, "tuning": {"type": "lora", "layers": 2}, "tail": (0, 1, 2, 0)[stage],
        }  # fmt: skip
    for tail in (0, 1, 3, 4):
        yield f"llama stage 3 lora in 2 layers tail {tail}", {
            "tuning": {"type": "lora", "layers": 2}, "tail": tail,
        }  # fmt: skip
    for name, more in (
        ("head", {"targets": ["lm_head"]}),
        ("dropout", {"dropout": 0.2}),
    ):
        yield f"llama stage 3 lora {name}", {"tuning": {"type": "lora", **more}}
    yield "qwen3_moe stage 3 qlora of experts", {
        "family": "qwen3_moe", "tuning": {"type": "qlora", "targets": ["q_proj", "experts"]},
    }  # fmt: skip
    yield "qwen3_moe stage 2 lora", {"family": "qwen3_moe", "stage": 2, "tuning": {"type": "lora"}, "tail": 2}


SETTINGS: dict[str, dict[str, Any]] = {name: {**SHAPE, **fields} for name, fields in (*_full(), *_tuned())}
