"""What transformers 5 assumes where a configuration is silent: tied embeddings and RoPE, by model_type.

The values are those of transformers' configuration classes for every family that mlx-lm has; a test holds them
against the installed transformers, which takes seconds to import and therefore is not imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TIED = _words(
    "cohere cohere2 ernie4_5 ernie4_5_moe falcon_mamba gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text "
    "gemma4 gemma4_text gemma4_unified gemma4_unified_text gpt2 gpt_bigcode kimi_k25 lfm2 lfm2_moe mamba "
    "minicpm3 mistral3 qwen3_vl_moe_text recurrent_gemma smollm3 starcoder2"
)

UNTIED = _words(
    "afmoe apertus bailing_hybrid bitnet dbrx deepseek_v2 deepseek_v3 deepseek_v32 dots1 exaone4 exaone_moe "
    "falcon_h1 glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt_neox gpt_oss gptj granite granitemoe "
    "granitemoehybrid helium hunyuan_v1_dense internlm3 iquestcoder jamba kimi_linear laguna llama llama4 "
    "llama4_text llava longcat_flash mamba2 mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl "
    "minimax_m3_vl_text ministral3 mistral mistral4 mixtral muse_glimmer_text muse_spark_text nanochat "
    "nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe phi phi3 phimoe qwen2 qwen2_5_vl qwen2_moe "
    "qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen3_vl "
    "qwen3_vl_moe seed_oss solar_open stablelm step3p5"
)

_THETA: Mapping[float, str] = {
    10_000.0: (
        "afmoe cohere2 dbrx deepseek_v2 deepseek_v3 deepseek_v32 dots1 exaone4 exaone_moe falcon_h1 gemma gemma2 "
        "glm4_moe_lite glm_moe_dsa granite granitemoe granitemoehybrid hunyuan_v1_dense internlm3 iquestcoder "
        "llama minicpm3 mistral muse_glimmer_text nanochat olmo olmo2 olmo_hybrid olmoe qwen2 qwen2_moe qwen3 "
        "qwen3_moe seed_oss starcoder2"
    ),
    100_000.0: ("helium"),
    500_000.0: (
        "bitnet cohere ernie4_5 ernie4_5_moe llama4_text muse_spark_text qwen3_vl_moe_text qwen3_vl_text"
    ),
    1_000_000.0: ("lfm2 lfm2_moe minimax mixtral phimoe qwen2_5_vl_text qwen2_vl_text solar_open"),
    2_000_000.0: ("smollm3"),
    5_000_000.0: ("minimax_m2 minimax_m3_vl_text"),
    6_000_000.0: ("bailing_hybrid"),
    10_000_000.0: ("longcat_flash"),
}

_PARTIAL: Mapping[tuple[float, float], str] = {  # (rope_theta, partial_rotary_factor)
    (10_000.0, 0.25): ("gpt_neox qwen3_5_moe_text qwen3_5_text qwen3_next stablelm"),
    (10_000.0, 0.5): ("glm glm4 glm4_moe nemotron phi recurrent_gemma"),
    (10_000.0, 1.0): ("phi3"),
}

ROPE: Mapping[str, Mapping[str, Any]] = {  # rope_parameters
    **{name: {"rope_theta": theta} for theta, names in _THETA.items() for name in names.split()},
    **{
        name: {"rope_theta": theta, "partial_rotary_factor": partial}
        for (theta, partial), names in _PARTIAL.items()
        for name in names.split()
    },
    "apertus": {
        "rope_type": "llama3",
        "rope_theta": 12000000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "gemma3_text": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "gemma3n_text": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "gemma4_text": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1000000.0,
        },
    },
    "gemma4_unified_text": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1000000.0,
        },
    },
    "gpt_oss": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
        "rope_theta": 150000.0,
    },
    "laguna": {
        "full_attention": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    },
    "mellum": {
        "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "mimo_v2_flash": {
        "full_attention": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.334},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.334},
    },
    "ministral3": {
        "rope_theta": 1000000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "max_position_embeddings": 262144,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.1,
        "rope_type": "yarn",
    },
    "mistral4": {
        "rope_theta": 10000.0,
        "factor": 128.0,
        "original_max_position_embeddings": 8192,
        "max_position_embeddings": 1048576,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.1,
        "partial_rotary_factor": 0.5,
        "rope_type": "yarn",
    },
    "olmo3": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "step3p5": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
}
