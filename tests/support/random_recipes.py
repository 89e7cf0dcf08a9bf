"""Recipes of tiny models drawn at random by a seed, and ways to spread a run that may change no bit of it.

A recipe is a list of `key=value`. Combinations that make no sense are drawn too: the command refuses them, on any
number of ranks alike.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

DENSE = ("llama", "qwen3", "gemma2", "olmo2", "phi3", "falcon")
MIXTURES = ("qwen3_moe", "llama4", "deepseek_v3", "gpt_oss")
FAMILIES = (*DENSE, *MIXTURES)
TARGETS = ("[q_proj, o_proj]", "all-linear", "all-linear", "[embed_tokens, lm_head]")
OF_MIXTURES = ("[experts]", "[o_proj, experts, lm_head]", "all-linear")
NONSENSE = 0.03  # how often a value is drawn that does not go with the others


def drawn(seed: int, count: int) -> list[list[str]]:
    """`count` recipes; each reads `rows`, and a folder called as its family."""
    chance = random.Random(seed)
    return [[f"{key}={value}" for key, value in _recipe(chance)] for _ in range(count)]


def spread(chance: random.Random, ranks: int, *, anew: bool = True) -> list[str]:
    """What a run on `ranks` machines may do otherwise, and end with the same bits; `anew`: from its first step on."""
    shares = [chance.randint(1, 3) for _ in range(ranks)]
    said = {
        "memory.zero_stage": chance.choice((0, 1, 2, 3, 3)),
        "memory.shares": chance.choice((shares, "equal")),
        "memory.gradient_checkpointing": chance.choice(("true", "true", "false", "auto")),
        "memory.run_ahead": chance.choice(("true", "false")),
        "memory.activation_offload": chance.choice(("true", "false")),
        "comm.route": chance.choice(("relay", "direct")),
        "comm.bucket_bytes": chance.choice((4096, 65536)),
    }
    if anew:
        said["numerics.compiled_layers"] = chance.choice(("true", "false"))
    return [f"{key}={str(value).replace(' ', '')}" for key, value in said.items()]


def _recipe(chance: random.Random) -> Iterator[tuple[str, object]]:
    odd = chance.random() < NONSENSE
    family = chance.choice(FAMILIES)
    # MLX's CPU has no stacked product in half precision.
    dtype = "float32" if family in MIXTURES and not odd else chance.choice(("float32", "bfloat16", "float16"))
    yield "model.path", family
    yield "model.dtype", dtype
    yield from _tuning(chance, family in MIXTURES)
    micro = chance.choice((1, 1, 2, 3))
    rows = micro * chance.randint(2, 5)
    packed = chance.choice(("true", "false"))
    yield "data.packing", packed
    yield "data.sequence_length", chance.choice((24, 48, 48, 300))
    yield "data.order", chance.choice(("shuffled", "file")) if odd or packed == "false" else "shuffled"
    yield "batch.micro_size", micro
    yield "batch.global_size", rows
    yield "batch.cells", chance.randint(1, rows // micro)
    yield from _optimizer(chance, odd or dtype == "bfloat16")
    yield (
        "memory.gradient_dtype",
        chance.choice(("auto", "float32", *["bfloat16"] * (odd or dtype != "float16"))),
    )
    if odd or dtype == "float16":
        yield "numerics.loss_scale", chance.choice(("8", "auto", "4096"))
        yield "numerics.loss_scale_window", chance.choice((1, 2000))
    if chance.random() < 0.15:
        yield "distillation.teacher", chance.choice(DENSE)
        yield "distillation.weight", chance.choice((0.3, 1.0))
        yield "distillation.temperature", chance.choice((1.0, 3.0))
        yield "distillation.top", chance.choice((1, 8))
    yield "run.seed", chance.randrange(1000)


def _optimizer(chance: random.Random, lossy: bool) -> Iterator[tuple[str, object]]:
    """`lossy`: whether masters may be anything."""
    name = chance.choice(("adamw", "adamw", "lion", "sgd"))
    yield "optimizer.name", name
    yield "optimizer.learning_rate", {"adamw": "3e-3", "lion": "1e-3", "sgd": "0.1"}[name]
    yield "optimizer.state_bits", chance.choice((8, 32))
    yield "optimizer.master_weights", chance.choice(("exact", "fp32", *["diet", "none"] * lossy))
    yield "optimizer.weight_decay", chance.choice((0, 0.1))
    yield "optimizer.clip_norm", chance.choice((1.0, 0.1, "null"))
    yield "optimizer.in_backward", chance.choice(("true", "false", "false"))


def _tuning(chance: random.Random, mixture: bool) -> Iterator[tuple[str, object]]:
    odd = chance.random() < NONSENSE
    ways = (
        "full",
        "full",
        "last",
        "named",
        "lora",
        "lora",
        "dora",
        "qlora",
        *["ternary"] * (odd or not mixture),
    )
    kind = chance.choice(ways)
    yield "tuning.type", kind if kind in ("lora", "dora", "qlora") else "full"
    match kind:
        case "last":
            yield "tuning.layers", chance.randint(1, 3)
        case "named":
            yield (
                "tuning.unfrozen_parameters",
                chance.choice(("['.*\\.2\\.']", "['.*norm']", "['.*embeddings|.*embed_tokens']")),
            )
        case "ternary":
            yield "tuning.qat", "ternary"
            yield "tuning.qat_warmup", chance.choice((0, 2))
            yield "tuning.qat_group", chance.choice((64, "matrix"))
        case "lora" | "dora" | "qlora":
            yield "tuning.rank", chance.choice((2, 5))
            yield "tuning.targets", chance.choice(OF_MIXTURES if mixture or odd else TARGETS)
            yield "tuning.dropout", chance.choice((0, 0, 0.2))
            yield "tuning.rslora", chance.choice(("true", "null"))
            if chance.random() < 0.3:
                yield "tuning.layers", 2
    if kind == "qlora":
        yield "tuning.bits", chance.choice((4, 8, 3, "ternary"))
