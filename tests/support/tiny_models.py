"""Tiny configurations, one per model family: four layers, 64 hidden units, a vocabulary of 256 tokens.

Small enough for a step on a CPU to take milliseconds, large enough that every code path of the family is
there: grouped-query attention, sliding windows, dense and expert layers, shared experts, attention sinks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.nn as nn

from mlx_empire.model.build import build_model, describe
from mlx_empire.model.spec import ModelSpec
from support.every_model import small_config

# The families that every test of full fine-tuning covers; OTHER_FAMILIES stream as well.
FAMILIES = ("llama", "qwen3", "gemma2", "qwen3_moe", "llama4", "deepseek_v3", "gpt_oss")
OTHER_FAMILIES = (
    "qwen2",
    "mixtral",
    "gemma",
    "gemma3_text",
    "phi3",
    "olmo2",
    "cohere2",
    "deepseek_v2",
    "starcoder2",
    "gpt2",
    "mamba2",
)
MIXTURES = frozenset({"qwen3_moe", "llama4", "deepseek_v3", "gpt_oss", "mixtral", "deepseek_v2"})

SMOLLM2 = {  # the sizes of SmolLM2-135M
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
}

_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

_DEEPSEEK: dict[str, Any] = {
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "head_dim": 8,  # as transformers understands it: the rotary part
}

_LLAMA4_TEXT: dict[str, Any] = {
    **_COMMON,
    "model_type": "llama4_text",
    "attention_bias": False,
    "attention_chunk_size": 32,
    "interleave_moe_layer_step": 1,
    "intermediate_size_mlp": 96,
    "num_experts_per_tok": 1,
    "num_local_experts": 4,
    "rope_scaling": None,
    "use_qk_norm": True,
}

_SPECIAL: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 64},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 64, "sliding_window_pattern": 2},
    "cohere2": {"layer_norm_eps": 1e-5},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "deepseek_v2": {
        **_DEEPSEEK,
        "topk_method": "greedy",
        "rope_scaling": {
            "type": "yarn",
            "factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 512,
        },
    },
    "deepseek_v3": {
        **_DEEPSEEK,
        "topk_method": "noaux_tc",
        "rope_scaling": None,
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64},
    "starcoder2": {"norm_epsilon": 1e-5},
    "gpt2": {
        "n_ctx": 256,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 4,
        "n_positions": 256,
        "layer_norm_epsilon": 1e-5,
    },
    "mamba2": {
        "num_heads": 8,
        "state_size": 16,
        "conv_kernel": 4,
        "n_groups": 1,
        "expand": 2,
        "chunk_size": 32,
        "use_bias": False,
        "use_conv_bias": True,
        "layer_norm_epsilon": 1e-5,
        "time_step_limit": [0.0, 100.0],
        "time_step_min": 0.001,
        "time_step_max": 0.1,
        "time_step_rank": 8,
    },
}

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama4": "Llama4ForConditionalGeneration",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}


def tiny_config(family: str, **overrides: Any) -> dict[str, Any]:
    """A fresh `config.json` for any family of mlx-lm; `overrides` replace keys (llama4: of its `text_config`)."""
    if family == "llama4":
        config: dict[str, Any] = {"model_type": family, "text_config": {**_LLAMA4_TEXT, **overrides}}
    elif family in FAMILIES or family in OTHER_FAMILIES:
        config = {**_COMMON, **_SPECIAL.get(family, {}), "model_type": family, **overrides}
    else:
        config = {**small_config(family), **overrides}
    if family in _ARCHITECTURES:
        config["architectures"] = [_ARCHITECTURES[family]]
    return config


def tiny_model(
    family: str, dtype: str = "float32", **overrides: Any
) -> tuple[Callable[[], nn.Module], ModelSpec]:
    """How to build the tiny model of a family lazily (again and again), and its description."""
    config = tiny_config(family, **overrides)
    build = partial(build_model, config, family)
    return build, describe(build(), config, family, dtype)
