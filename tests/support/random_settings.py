"""Settings of small models drawn at random by a seed: what nobody chose, and so nobody fitted the ledger to.

Each is the fields of a `Case` (a `TunedCase` with `tuning`) and its number of ranks. Sizes are those that two cores
run in seconds; families, and what is asked of them, are as wide as can be.
"""

from __future__ import annotations

import random
from typing import Any

MIXTURES = ("qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4", "olmoe")
DENSE = (
    *(
        "llama",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi3",
        "gpt2",
        "olmo2",
        "cohere2",
        "starcoder2",
    ),
    *("mamba2", "seed_oss", "granite", "smollm3", "helium", "glm4", "exaone4", "ministral3", "mimo"),
)


UNPACKED = ("gpt2", "mamba2")  # absolute positions, and no mask that could keep documents apart


def drawn(seed: int, count: int) -> list[tuple[int, dict[str, Any]]]:
    """(ranks, fields) of `count` settings; families come in an order of chance, each before any comes again."""
    chance = random.Random(seed)
    families: list[str] = []
    while len(families) < count:
        families += chance.sample([*DENSE, *MIXTURES], len(DENSE) + len(MIXTURES))
    return [_setting(chance, family) for family in families[:count]]


def drawn_otherwise(seed: int, count: int) -> list[tuple[int, dict[str, Any]]]:
    """The settings of `drawn` with a main thread that runs ahead, with packed rows, or with rows that are long enough
    for attention by pattern, packed or not.

    Packed rows hold one document to eight, of each micro-batch others: a plan is for any rows that may come.
    """
    chance = random.Random(f"{seed} otherwise")
    return [(ranks, fields | _otherwise(chance, fields)) for ranks, fields in drawn(seed, count)]


def _otherwise(chance: random.Random, fields: dict[str, Any]) -> dict[str, Any]:
    may_pack = fields["family"] not in UNPACKED
    ways: list[dict[str, Any]] = [{"run_ahead": True}]
    if may_pack:
        ways.append({"packed": True, "documents": 0})
    if fields["dtype"] == "float32":
        width = 16 * chance.randint(17, 32)
        packed = {"packed": True, "documents": 0} if may_pack and chance.random() < 0.5 else {}
        ways.append({"by_pattern": True, "width": width, **packed})
    return chance.choice(ways)


def title(ranks: int, fields: dict[str, Any]) -> str:
    """One line that tells a setting."""
    config = fields["config"]
    tuning = fields.get("tuning", {"type": "full"})
    said = {
        "hidden": config.get("hidden_size", config.get("n_embd")),
        "mlp": config.get("intermediate_size", "-"),
        "heads": config.get("num_attention_heads", config.get("n_head")),
        "layers": config.get("num_hidden_layers", config.get("n_layer")),
        "vocabulary": config["vocab_size"],
    }
    sizes = " ".join(f"{name} {size}" for name, size in said.items())
    how = f"{tuning['type']}{tuning.get('bits', '')} {fields.get('optimizer', 'adamw')}{fields['state_bits']}"
    step = f"{fields['rows']} x {fields['width']} x {fields['micro_batches']}, cells {fields['cells']}"
    ways = "".join(f", {way}" for way in ("run_ahead", "packed", "by_pattern") if fields.get(way))
    return (
        f"{fields['family']}: {sizes}; {step}; {ranks} ranks, stage {fields['stage']}, tail {fields['tail']}, {how}, "
        f"{fields['dtype']}{ways}"
    )


def _setting(chance: random.Random, family: str) -> tuple[int, dict[str, Any]]:
    ranks = chance.choice((1, 1, 1, 2))
    layers = (
        4 if family in ("gpt_oss", "llama4", "cohere2") else chance.randint(3, 5)
    )  # their kinds come by fours
    kind = chance.choice(("full", "full", "lora", "qlora"))
    # MLX's CPU has no stacked product in bfloat16, and is slow in it.
    low = kind == "full" and family not in MIXTURES and chance.random() < 0.3
    fields = {
        "family": family,
        "shares": [1] if ranks == 1 else [chance.choice((1, 2, 3)), 1],
        "stage": chance.choice((0, 1, 2, 3)),
        "tail": chance.choice((0, 0, 0, 1, 2, layers)),
        "rows": chance.choice((1, 1, 2)),
        "width": 16 * (chance.randint(2, 4) if low else chance.randint(3, 16)),
        "micro_batches": ranks * chance.randint(1, 2),
        "cells": "auto",
        "dtype": "bfloat16" if low else "float32",
        "gradient_dtype": "bfloat16" if low else "float32",
        "state_bits": chance.choice((8, 32)),
        "config": _config(chance, family, layers, large=kind != "full"),
    }
    if kind == "full":
        fields["optimizer"] = chance.choice(("adamw", "adamw", "lion", "sgd"))
        if fields["optimizer"] == "sgd":
            fields["state_bits"] = 32
    else:
        fields["tuning"] = {"type": kind, "rank": chance.choice((4, 8, 16))}
        if kind == "qlora":
            fields["tuning"]["bits"] = chance.choice((4, 8))
    return ranks, fields


def _config(chance: random.Random, family: str, layers: int, *, large: bool) -> dict[str, Any]:
    """`large`: for a frozen base, beside which the constants of a small model would be most of the peak."""
    heads, width = chance.choice((4, 8)), chance.choice((32, 48, 64))
    hidden = chance.choice((384, 512) if large else (192, 256, 320))
    mlp = 64 * chance.randint(3, 14)
    vocabulary = 1024 * chance.choice((2, 4, 8))
    if family == "gpt2":
        return {
            **{"vocab_size": vocabulary, "n_embd": hidden, "hidden_size": hidden, "n_head": heads},
            "n_layer": layers,
            **{"n_positions": 512, "n_ctx": 512, "num_hidden_layers": layers},
        }
    config = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": chance.choice((heads // 2, heads)),
        "head_dim": width,
    }
    match family:
        case "deepseek_v2" | "deepseek_v3":
            config |= {"num_key_value_heads": heads, "moe_intermediate_size": mlp // 4, "kv_lora_rank": 64}
            config |= {"q_lora_rank": 64, "qk_nope_head_dim": width, "v_head_dim": width}
            del config["head_dim"]
        case "qwen3_moe":
            config |= {"moe_intermediate_size": mlp // 4, "num_experts": 8}
        case "llama4":
            config |= {"intermediate_size": mlp // 2, "intermediate_size_mlp": mlp}
        case "gemma2" | "gemma3_text":
            config |= {"query_pre_attn_scalar": width}
        case "cohere2" | "starcoder2" | "olmoe" | "mixtral" | "phi3" | "granite" | "gpt_oss":
            config["head_dim"] = hidden // heads
        case "mamba2":
            config |= {"num_heads": 2 * heads, "head_dim": hidden // heads, "state_size": 32}
    return config
