"""A model's architecture with small numbers: what is asked of it takes a second and no memory, even for a model that no
machine holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_empire.model.build import default_numbers

MOST_LAYERS = 12
VOCABULARY, HIDDEN, HEADS, HEAD_DIM = 256, 64, 4, 16

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers")
SMALL_NUMBERS: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "model_dim", "block_dim", "conv_dim"), HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("head_dim", "query_pre_attn_scalar", "v_head_dim", "qk_nope_head_dim"), HEAD_DIM),
    **dict.fromkeys(("swa_head_dim", "swa_v_head_dim"), HEAD_DIM),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "n_inner", "ff_intermediate_size"), 96),
    **dict.fromkeys(("block_ff_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size"), 32),
    **dict.fromkeys(("n_ctx", "chunk_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_groups"), 1),
    "qk_rope_head_dim": 8,
    "dim_model_base": HIDDEN,
}
AT_MOST: dict[str, int] = {
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "n_shared_experts", "moe_top_k"), 2),
    **dict.fromkeys(LAYERS, MOST_LAYERS),
    "rotary_dim": 8,
}
KEY_VALUE_HEADS = (
    *("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads"),
    *("swa_num_key_value_heads", "num_global_key_value_heads"),
)
PARTS = ("partial_rotary_factor", "rotary_pct")  # below 1 a half, so that a small head has an even number
NESTED = ("text_config", "attn_config", "ffn_config")
WHOLE_VOCABULARY = ("phi3small",)  # writes to logits by their numbers: with fewer, past the end of them


def scaled_down_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same architecture with small numbers; lists with one entry per layer are shortened alike.

    Sizes that the configuration leaves to mlx-lm's defaults become small too.
    """
    sizes = (*SMALL_NUMBERS, *AT_MOST, *KEY_VALUE_HEADS)
    config = {k: v for k, v in default_numbers(config).items() if k in sizes} | dict(config)
    layers = next((config[k] for k in LAYERS if k in config), 0)
    heads = next((config[k] for k in ("num_attention_heads", "n_head", "n_heads") if k in config), 0)
    scaled: dict[str, Any] = {}
    for key, value in config.items():
        if key in NESTED and isinstance(value, Mapping):
            scaled[key] = scaled_down_config(value)
        elif isinstance(value, bool) or value is None:
            scaled[key] = value
        elif isinstance(value, list) and layers and len(value) == layers:
            scaled[key] = value[:MOST_LAYERS]
        elif key in KEY_VALUE_HEADS:
            scaled[key] = HEADS if value == heads else 1 if value == 1 else 2
        elif key in SMALL_NUMBERS and isinstance(value, int | float):
            scaled[key] = SMALL_NUMBERS[key]
        elif key in AT_MOST and isinstance(value, int):
            scaled[key] = min(value, AT_MOST[key])
        elif key in PARTS and isinstance(value, int | float):
            scaled[key] = value if value >= 1 else 0.5
        elif key in ("rope_scaling", "rope_parameters") and isinstance(value, Mapping):
            scaled[key] = _one_factor(value)
        else:
            scaled[key] = value
    if config.get("model_type") in WHOLE_VOCABULARY:
        scaled["vocab_size"] = config["vocab_size"]
    return scaled


def _one_factor(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Of a list with a factor for each rotary dimension the first for all (fewer here). Also in layer types."""
    small = dict(rope)
    for key, value in rope.items():
        if isinstance(value, Mapping):
            small[key] = _one_factor(value)
        elif isinstance(value, list) and value:
            small[key] = value[0]
    return small
