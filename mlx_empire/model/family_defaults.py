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
    "cohere cohere2 ernie4_5 ernie4_5_moe falcon falcon_mamba gemma gemma2 gemma3 gemma3_text gemma3n "
    "gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text gpt2 gpt_bigcode kimi_k25 lfm2 lfm2_moe "
    "mamba minicpm3 mistral3 qwen3_vl_moe_text recurrent_gemma smollm3 starcoder2"
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
        "afmoe cohere2 dbrx deepseek_v2 deepseek_v3 deepseek_v32 dots1 exaone4 exaone_moe falcon falcon_h1 gemma "
        "gemma2 glm4_moe_lite glm_moe_dsa granite granitemoe granitemoehybrid hunyuan_v1_dense internlm3 "
        "iquestcoder llama minicpm3 mistral muse_glimmer_text nanochat olmo olmo2 olmo_hybrid olmoe qwen2 qwen2_moe "
        "qwen3 qwen3_moe seed_oss starcoder2"
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

_DEEPSEEK_V3: Mapping[str, Any] = {
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
}

# Other keys of which mlx-lm's module assumes another value than transformers' class does where they are missing, sizes
# excepted that the tensors' shapes show; and what that class has built in and mlx-lm's module wants to be told.
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {
        "num_attention_heads": 16,
        "head_dim": 128,
        "num_experts": 64,
        "num_experts_per_tok": 6,
        "num_shared_experts": 2,
        "num_dense_layers": 1,
        "route_scale": 1.0,
        "sliding_window": 1024,
        "mup_enabled": False,
    },
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "bailing_hybrid": {"head_dim": 128},
    "cohere2": {"num_attention_heads": 64},
    "deepseek_v2": {"n_shared_experts": 2, "n_routed_experts": 64, "topk_method": "greedy"},
    **dict.fromkeys(("deepseek_v3", "deepseek_v32"), _DEEPSEEK_V3),
    "ernie4_5": {"head_dim": 128},
    "ernie4_5_moe": {
        "moe_layer_start_index": 1,
        "moe_k": 6,
        "moe_num_shared_experts": 2,
        "moe_layer_end_index": -1,
    },
    "falcon_h1": {
        "attention_out_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "key_multiplier": 1.0,
        "lm_head_multiplier": 1.0,
        "mamba_d_head": "auto",
        "mamba_d_ssm": 1024,
        "mamba_d_state": 256,
        "mamba_n_heads": 128,
        "mamba_norm_before_gate": True,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "ssm_in_multiplier": 1.0,
        "ssm_out_multiplier": 1.0,
    },
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256},
    "gemma3_text": {
        "head_dim": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
    },
    "gemma3n_text": {"head_dim": 256},
    "gemma4_text": {
        "num_key_value_heads": 4,
        "num_kv_shared_layers": 0,
        "final_logit_softcapping": None,
        "use_double_wide_mlp": False,
    },
    "gemma4_unified_text": {
        "num_key_value_heads": 4,
        "num_kv_shared_layers": 0,
        "sliding_window": 1024,
        "final_logit_softcapping": None,
        "use_double_wide_mlp": False,
    },
    "glm": {"head_dim": 128, "attention_bias": True},
    "glm4": {"head_dim": 128},
    "glm_moe_dsa": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    "granitemoehybrid": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 1024,
        "mamba_n_heads": 128,
        "mamba_d_head": "auto",
        "mamba_proj_bias": False,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
    },
    "gpt_oss": {"head_dim": 64},
    "helium": {"head_dim": 128},
    "internlm3": {"num_key_value_heads": 2},
    "iquestcoder": {"head_dim": 128, "num_key_value_heads": 8},
    "kimi_linear": {
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "routed_scaling_factor": 2.446,
    },
    "laguna": {"head_dim": 128},
    "llama4_text": {"head_dim": 128},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "mamba2": {"head_dim": 64},
    "mellum": {"head_dim": 128},
    "mimo_v2_flash": {
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "n_shared_experts": None,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "head_dim": 192,
        "attention_value_scale": 0.707,
    },
    "minimax_m2": {"shared_intermediate_size": 0, "head_dim": 128},
    "minimax_m3_vl_text": {
        "rotary_dim": 64,
        "index_n_heads": 4,
        "index_head_dim": 128,
        "index_block_size": 128,
        "index_topk_blocks": 16,
    },
    "ministral3": {"head_dim": 128, "num_key_value_heads": 8},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "mistral4": {"rope_interleave": True},
    "muse_spark_text": {"head_dim": 64},
    "nanochat": {"num_attention_heads": 6},
    "nemotron_h": {
        "head_dim": 128,
        "moe_shared_expert_intermediate_size": 7688,
        "n_group": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "time_step_min": 0.001,
        "time_step_max": 0.1,
    },
    "phimoe": {"rms_norm_eps": 1e-05},
    "qwen2_moe": {"num_key_value_heads": 16},
    "qwen3": {"head_dim": 128},
    "qwen3_5_moe_text": {
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "head_dim": 256,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "shared_expert_intermediate_size": 512,
    },
    "qwen3_5_text": {
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "head_dim": 256,
    },
    "qwen3_next": {"head_dim": 256, "norm_topk_prob": True},
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
    "qwen3_vl_text": {"head_dim": 128},
    "seed_oss": {"head_dim": 128, "attention_bias": True},
    "smollm3": {"num_key_value_heads": 4},
    "solar_open": {
        "first_k_dense_replace": 0,
        "intermediate_size": 0,
        "head_dim": 128,
        "partial_rotary_factor": 1.0,
    },
    "step3p5": {"head_dim": 128, "sliding_window": None, "moe_router_scaling_factor": 1.0},
}
