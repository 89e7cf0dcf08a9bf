"""A small configuration for (almost) every module of mlx-lm, made from the dataclass that it reads.

Fields that are not known by name keep their defaults; what a family needs besides stands in SPECIAL.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

import mlx_lm.models

from mlx_empire.model.config import TEXT_READERS
from mlx_empire.model.mlx_lm_modules import OURS

LAYERS = 4
NUMBERS: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "block_dim", "conv_dim", "model_dim", "hidden_dim"), 64
    ),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "n_positions"), 256),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "num_layers"), LAYERS),
    **dict.fromkeys(
        ("num_attention_heads", "n_heads", "n_head", "num_heads", "linear_num_value_heads", "mamba_n_heads"),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "v_head_dim", "qk_nope_head_dim", "query_pre_attn_scalar", "swa_head_dim"), 16
    ),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "global_head_dim"), 16),
    **dict.fromkeys(
        ("intermediate_size", "block_ff_dim", "intermediate_size_mlp", "ff_intermediate_size"), 96
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "dense_intermediate_size"), 48
    ),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "mamba_d_state"), 16),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "moe_top_k"), 2),
    **dict.fromkeys(
        ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1
    ),
    **dict.fromkeys(
        ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layernorm_epsilon", "layer_norm_epsilon"), 1e-5
    ),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "sliding_window_size", "n_ctx"), 64),
    "qk_rope_head_dim": 8,
    "rotary_dim": 8,
    "max_position_embeddings": 512,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
}
LFM2: dict[str, Any] = {"full_attn_idxs": [1, 3], "block_auto_adjust_ff_dim": False}
LONGCAT = {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_type": "identity"}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}
SPECIAL: dict[str, dict[str, Any]] = {
    **{name: {"mlp_only_layers": []} for name in ("Klear", "qwen3_moe", "qwen3_next", "qwen3_vl_moe")},
    **{name: {"sliding_window_pattern": 2} for name in ("gemma3", "gemma3_text")},
    **{name: LFM2 for name in ("lfm2", "lfm2-vl")},
    **{name: LONGCAT for name in ("longcat_flash", "longcat_flash_ngram")},
    "afm7": {"num_kv_reuse_layers": 1},
    "baichuan_m1": {
        "sliding_window_layers": [0, 2],
        "num_swa_attention_heads": 4,
        "num_swa_key_value_heads": 2,
    },
    "deepseek_v2": {
        "rope_scaling": {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 512},
    },
    "exaone_moe": {"is_moe_layer": [False, True, True, True]},
    "falcon_h1": MAMBA,
    "granitemoehybrid": {"layer_types": ["attention"] * LAYERS, "shared_intermediate_size": 48},
    "gemma3n": {"altup_active_idx": 0},
    "glm_moe_dsa": {"index_head_dim": 16, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "hunyuan": {"cla_share_factor": 2, "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
    "lfm2_moe": {
        "full_attn_idxs": [1, 3],
        "layer_types": ["conv", "full_attention"] * 2,
        "num_dense_layers": 1,
    },
    "jamba": {"num_experts": 1},  # of more it weighs the chosen ones otherwise: refused
    "llama4": {"num_experts_per_tok": 1},
    "llama4_text": {"no_rope_layers": [1, 1, 1, 0]},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0, 1],
        "moe_layer_freq": [0, 1, 1, 1],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_v_head_dim": 16,
        "swa_rope_theta": 10_000.0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    "mamba2": {"n_groups": 1},
    "minicpm3": {"rope_scaling": {"type": "longrope", "short_factor": 1.0, "long_factor": 1.0}},
    "nemotron-nas": {
        "block_configs": [{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}}] * LAYERS
    },
    "nemotron": {"hidden_act": "relu2"},
    "plamo": {"n_shared_head": 2},
}
BARE = {"bool": False, "int": 2, "float": 1.0, "str": "silu"}
# Modules with a rope_theta for which the two spellings cannot be compared, and why.
UNBUILT = {
    "bitnet": "its kernel runs on Metal only",
    "glm": "turns whole heads, where every glm turns half of each: refused",
    "kimi_linear": "turns nothing: its attention has no positions",
    "mistral4": "reads rope_parameters alone",
    "recurrent_gemma": "has 10,000 built in, whatever rope_theta says",
}


def reader(name: str) -> dict[str, Field[Any]]:
    """The fields that mlx-lm's module `name` reads the language model's part of a configuration into."""
    module, _, kind = TEXT_READERS.get(name, f"{name}.ModelArgs").rpartition(".")
    read = getattr(importlib.import_module(f"mlx_lm.models.{module}"), kind, None)
    return {f.name: f for f in fields(read)} if is_dataclass(read) else {}


def names() -> list[str]:
    """The modules that have a model: mlx-lm's and those of our own, which mlx-lm finds among its."""
    found = sorted({*OURS, *(m.name for m in pkgutil.iter_modules(mlx_lm.models.__path__))})
    return [name for name in found if reader(name)]


def small_config(name: str, **changes: Any) -> dict[str, Any]:
    """A small configuration for module `name`; `changes` go where its language model reads them."""
    text: dict[str, Any] = {"model_type": name}
    for key, field in reader(name).items():
        required = field.default is MISSING and field.default_factory is MISSING
        if key in NUMBERS and (required or key not in ("partial_rotary_factor", "rotary_dim", "layer_types")):
            text[key] = NUMBERS[key]
        elif required and key != "model_type":
            kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
            text[key] = BARE.get(kind)
    text |= copy.deepcopy(SPECIAL.get(name, {})) | changes
    if name not in TEXT_READERS:
        return text
    inner = TEXT_READERS[name].partition(".")[0]
    return {"model_type": name, "vocab_size": 256, "text_config": {**text, "model_type": inner}}
