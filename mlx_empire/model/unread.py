"""What a configuration asks for and mlx-lm's module of the family does otherwise, without a word.

Decides which keys are refused by name: the model would be another one than the folder's, and its loss would not say
so. Each line was found by changing one key and comparing with torch's loss (tests/interop/test_families.py does it
again). A sliding window that the module lacks is no reason against rows that fit in it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from mlx_empire.errors import UserError
from mlx_empire.model.mlx_lm_modules import said_of

LEARNT_POSITIONS = ("gpt2", "gpt_bigcode")
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act", "mamba_hidden_act")
SILU = ("silu", "swish")
# Exact or not: their difference is 5e-4 at most, and mlx-lm takes the one where transformers takes the other.
GELU = ("gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "gelu_accurate")
RELU2 = ("relu2",)
BUILT_IN: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            *(
                "afmoe",
                "cohere",
                "cohere2",
                "deepseek_v2",
                "deepseek_v3",
                "deepseek_v32",
                "dots1",
                "ernie4_5",
            ),
            *(
                "ernie4_5_moe",
                "exaone4",
                "exaone_moe",
                "falcon_h1",
                "glm",
                "glm4",
                "glm4_moe",
                "glm4_moe_lite",
            ),
            *(
                "glm_moe_dsa",
                "gpt_oss",
                "granite",
                "granitemoe",
                "granitemoehybrid",
                "helium",
                "hunyuan_v1_dense",
            ),
            *(
                "internlm3",
                "jamba",
                "kimi_linear",
                "laguna",
                "llama",
                "llama4",
                "longcat_flash",
                "mamba",
                "mamba2",
            ),
            *("mellum", "mimo_v2_flash", "minicpm3", "minimax", "ministral3", "mistral4", "mixtral", "olmo2"),
            *("olmo3", "olmo_hybrid", "olmoe", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_5"),
            *("qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "stablelm"),
        ),
        SILU,
    ),
    **dict.fromkeys(
        (
            *(
                "gemma",
                "gemma2",
                "gemma3_text",
                "gemma3n",
                "gemma4_text",
                "gpt2",
                "gpt_bigcode",
                "gpt_neox",
                "gptj",
            ),
            *("phi", "starcoder2"),
        ),
        GELU,
    ),
    **dict.fromkeys(("nanochat", "nemotron"), RELU2),
    "nemotron_h": (*RELU2, *SILU),  # of its MLPs and of its mixers
    "apertus": ("xielu",),
}

# module -> key -> the values with which it computes what the model of the folder does.
UNREAD: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "deepseek_v3": {"rope_interleave": (True,)},
    "falcon_h1": {"attention_in_multiplier": (1,), "key_multiplier": (1,)},
    "gemma3_text": {"final_logit_softcapping": (None,)},
    "gpt2": {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
    "gpt_bigcode": {"multi_query": (True,), "scale_attn_weights": (True,)},
    "gpt_neox": {"attention_bias": (True,)},
    "gpt_oss": {"swiglu_limit": (7.0,)},  # which it has built in
    "jamba": {"num_experts": (0, 1)},  # weighs the chosen experts by a softmax of these alone
    "laguna": {
        "gating": (True, "per-head", False)
    },  # per element; false: without, or the gate's tensors are refused
    "mamba2": {"n_groups": (1,)},  # normalises all groups as one
    "olmoe": {"clip_qkv": (None,)},
    "qwen2_moe": {"norm_topk_prob": (False,)},
}
ANY_MODULE: Mapping[str, tuple[Any, ...]] = {"use_bidirectional_attention": (None, False, "vision")}
# module -> keys that it cannot do without, where null means that the model does.
NEEDED: Mapping[str, tuple[str, ...]] = {"gemma2": ("attn_logit_softcapping", "final_logit_softcapping")}
# Stored tensors that count and that the module drops or has no place for.
DROPPED: Mapping[str, tuple[str, ...]] = {
    "ernie4_5_moe": ("moe_statics.e_score_correction_bias",),
    "llama4_text": ("feed_forward.experts.gate_up_proj",),
}
# Of one chosen expert these leave the weight as it is, where the family's own code makes it 1.
SINGLE = frozenset({"afmoe", "deepseek_v3", "deepseek_v32", "exaone_moe", "glm4_moe", "glm4_moe_lite"})

# model_type -> which of its layers have a window where no `layer_types` says it, and mlx-lm's module never has one.
WINDOWLESS = frozenset(
    {"gemma2", "ministral3", "mistral", "mixtral", "phi3", "phimoe", "starcoder2"}
    | {"qwen2", "qwen2_moe", "qwen3", "qwen3_moe"}
)


def refuse_unread_keys(
    section: Mapping[str, Any], module: str, where: str, stored: Collection[str] = ()
) -> None:
    """UserError naming the key of `section` that mlx-lm's `module` would leave out; `stored`: the folder's tensors."""

    def refuse(key: str, value: object) -> NoReturn:
        raise UserError(
            f"{where}: {key}: {str(value)[:80]}: {said_of(module)} would leave it out, so the model would be "
            "another one; use a folder of another family"
        )

    built_in = BUILT_IN.get(module)
    for key in ACTIVATIONS:
        value = section.get(key)
        if built_in and isinstance(value, str) and value not in built_in and not _overruled(section, key):
            refuse(key, value)
    for key, allowed in {**ANY_MODULE, **UNREAD.get(module, {})}.items():
        if key in section and section[key] not in allowed:
            refuse(key, section[key])
    for key in NEEDED.get(module, ()):
        if key in section and section[key] is None:
            raise UserError(
                f"{where}: {key}: null: {said_of(module)} has no way without it; if the model was trained with it and "
                "another tool switched it off, write its number, else use a folder of another family"
            )
    if module in SINGLE and section.get("num_experts_per_tok") == 1 and section.get("norm_topk_prob"):
        refuse("norm_topk_prob", True)
    for ending in DROPPED.get(module, ()):
        if any(name.endswith(ending) for name in stored):
            refuse("tensors", f"*.{ending}")


def _overruled(section: Mapping[str, Any], key: str) -> bool:
    """Gemma's older configurations name two activations, of which the newer key counts."""
    return key == "hidden_act" and isinstance(section.get("hidden_activation"), str)


def left_out_window(config: Mapping[str, Any]) -> int | None:
    """Tokens of the sliding window of a completed configuration that mlx-lm's module does not have; None without."""
    text = config.get("text_config")
    section = text if isinstance(text, Mapping) else config
    window, types = section.get("sliding_window"), section.get("layer_types")
    if section.get("model_type") not in WINDOWLESS or not isinstance(window, int):
        return None
    if isinstance(types, list):
        read = section["model_type"] in ("mistral", "ministral3")  # whose modules read `layer_types`
        return None if read or "sliding_attention" not in types else window
    return None if section.get("use_sliding_window") is False else window


def learnt_positions(config: Mapping[str, Any]) -> int | None:
    """Rows of a completed configuration's table of positions; None for families that have none."""
    known = config.get("n_positions") if config.get("model_type") in LEARNT_POSITIONS else None
    return known if isinstance(known, int) else None


def short_factors_up_to(config: Mapping[str, Any]) -> int | None:
    """Tokens of the longest row for which a completed configuration's longrope has factors of its own; None without.

    mlx-lm takes those of long rows for all.
    """
    text = config.get("text_config")
    section = text if isinstance(text, Mapping) else config
    scaling = section.get("rope_scaling")
    if not isinstance(scaling, Mapping) or scaling.get("rope_type", scaling.get("type")) not in (
        "longrope",
        "su",
    ):
        return None
    if all(scaling.get(f"short_{key}") == scaling.get(f"long_{key}") for key in ("factor", "mscale")):
        return None
    name = "original_max_position_embeddings"
    original = scaling.get(name) or section.get(name)
    return original if isinstance(original, int) else None


def counted_from_row(config: Mapping[str, Any]) -> int | None:
    """Tokens of the longest row in which a document is read as it is alone, of a completed configuration; None: any.

    Chunks and the queries' temperature of llama4, and the columns of phi3small's block-sparse layers, go by the place
    in the row.
    """
    text = config.get("text_config")
    section = text if isinstance(text, Mapping) else config
    if config.get("model_type") in ("llama4", "llama4_text"):
        tempered = (
            int(section.get("floor_scale") or 8192) - 1 if section.get("attn_temperature_tuning", 4) else None
        )
        chunk = section.get("attention_chunk_size")
        return min((n for n in (tempered, chunk) if isinstance(n, int)), default=None)
    if config.get("model_type") == "phi3small":
        sizes = ("blocksparse_block_size", 64), ("blocksparse_num_local_blocks", 16)
        return math.prod(int(section.get(key) or default) for key, default in sizes)
    return None


def refuse_row_length(config: Mapping[str, Any], length: int, name: str, *, packed: bool = False) -> None:
    """UserError where mlx-lm's module computes another model on rows of `length` tokens than the folder's: they are
    longer than a table of positions, behind whose end MLX reads on, reach farther than a window that it leaves out, or
    are short enough for longrope's short factors; and where documents that share a row would be read otherwise there.
    """
    apart = counted_from_row(config) if packed else None
    if apart is not None and length > apart:
        raise UserError(
            f"data.packing: true: in rows of {length} positions {name} reads a document otherwise than alone, for its "
            f"attention goes by the place in the row; set data.sequence_length to at most {apart}, or packing: false"
        )
    positions = learnt_positions(config)
    if positions is not None and length > positions:
        raise UserError(
            f"data.sequence_length: {length}: {name} has learnt {positions} positions and no more; "
            f"use at most {positions}"
        )
    window = left_out_window(config)
    if window is not None and length > window:
        raise UserError(
            f"data.sequence_length: {length}: {name} has a sliding window of {window} tokens, which mlx-lm's module "
            f"of its family leaves out; use at most {window}"
        )
    original = short_factors_up_to(config)
    if original is not None and length <= original:
        raise UserError(
            f"data.sequence_length: {length}: {name} has RoPE factors of its own for rows up to {original} tokens, and "
            f"mlx-lm takes those of longer rows; use more than {original}, or make short_factor and long_factor the "
            "same in config.json, which then holds in all tools"
        )
