"""A small configuration for every model that mlx-lm can build: by the names of its own fields, corrected where needed.

The list of models is mlx-lm's own, so a new one joins by itself. Numbers come from `NUMBERS` by the field's name; a
field that is not there keeps the model's default. `_CORRECTIONS` holds what no name can say: lists with an entry per
layer, nested configurations, sizes that have to fit each other.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import io
import pkgutil
from typing import Any

import mlx_lm.models

from mlx_empire.model.mlx_lm_modules import OURS

LAYERS, HIDDEN, HEADS, HEAD_DIM, VOCABULARY = 4, 64, 4, 16, 256

_NAMES: tuple[tuple[Any, str], ...] = (
    (
        VOCABULARY,
        "vocab_size num_vocab vocab_size_per_layer_input max_position_embeddings n_positions block_size",
    ),
    (VOCABULARY, "model_max_length original_max_position_embeddings"),
    (
        HIDDEN,
        "hidden_size n_embd d_model model_dim hidden_dim embedding_size block_dim dim_model_base moe_hidden_size",
    ),
    (HIDDEN, "mamba_d_ssm"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers num_transformer_layers"),
    (HEADS, "num_attention_heads n_head n_heads num_heads swa_num_attention_heads linear_num_value_heads"),
    (HEADS, "mamba_num_heads linear_num_key_heads index_n_heads mamba_n_heads"),
    (
        2,
        "num_key_value_heads num_kv_heads n_kv_heads swa_num_key_value_heads num_attention_groups n_shared_head",
    ),
    (
        2,
        "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k hc_mult zero_expert_num o_groups",
    ),
    (2, "attn_layer_period expert_layer_period layer_group_size group_norm_size full_attention_interval"),
    (
        2,
        "sliding_window_pattern interleave_moe_layer_step no_rope_layer_interval cla_share_factor mamba_expand",
    ),
    (2, "dense_attention_every_n_layers"),
    (
        HEAD_DIM,
        "head_dim v_head_dim qk_nope_head_dim swa_head_dim swa_v_head_dim linear_key_head_dim qk_head_dim",
    ),
    (
        HEAD_DIM,
        "linear_value_head_dim mamba_head_dim mamba_d_head index_head_dim hidden_size_per_head kv_channels",
    ),
    (HEAD_DIM, "kv_lora_rank q_lora_rank o_lora_rank state_size ssm_state_size mamba_d_state index_topk"),
    (HEAD_DIM, "a_low_rank_dim v_low_rank_dim gate_low_rank_dim decay_low_rank_dim block_multiple_of"),
    (HEAD_DIM, "ffn_dim_divisor query_pre_attn_scalar"),
    (96, "intermediate_size ff_intermediate_size n_inner block_ff_dim mlp_hidden_size ffn_hidden_size"),
    (96, "intermediate_size_mlp dense_intermediate_size"),
    (32, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size share_expert_dim"),
    (
        32,
        "moe_shared_expert_intermediate_size expert_ffn_hidden_size sliding_window attention_chunk_size n_ctx",
    ),
    (
        32,
        "sliding_window_size attention_window_size window_size mamba_chunk_size chunk_size loop_window_size",
    ),
    (32, "global_head_dim"),
    (8, "qk_rope_head_dim rotary_dim time_step_rank"),
    (
        4,
        "num_experts num_local_experts n_routed_experts moe_num_experts conv_kernel mamba_d_conv conv_window",
    ),
    (4, "conv1d_width linear_conv_kernel_dim conv_L_cache"),
    (1, "n_group topk_group n_groups mamba_n_groups n_shared_experts num_shared_experts num_shared_expert"),
    (
        1,
        "first_k_dense_replace moe_layer_freq decoder_sparse_step num_dense_layers attn_layer_offset scale_emb",
    ),
    (1, "expert_layer_offset embedding_multiplier logits_scaling residual_multiplier num_kv_reuse_layers"),
    (1, "routed_scaling_factor block_ffn_dim_multiplier mup_width_multiplier"),
    (0.25, "attention_multiplier"),
    (0.5, "partial_rotary_factor rotary_pct"),
    (1.4, "scale_depth"),
    (20.0, "gegelu_limit logits_soft_cap"),
    (
        1e-5,
        "rms_norm_eps layer_norm_epsilon layer_norm_eps norm_eps norm_epsilon layernorm_epsilon post_norm_eps",
    ),
    (10000.0, "rope_theta swa_rope_theta rotary_emb_base"),
    (
        False,
        "attention_bias mlp_bias use_bias use_qkv_bias bias qkv_bias tie_word_embeddings mamba_proj_bias",
    ),
    (False, "use_mixed_mlp_moe conv_bias block_auto_adjust_ff_dim linear_allow_neg_eigval use_cla post_norm"),
    (False, "add_swa_attention_sink_bias add_full_attention_sink_bias"),
    (
        True,
        "norm_topk_prob use_qk_norm qk_norm use_conv_bias use_expert_bias mla_scale_q_lora mla_scale_kv_lora",
    ),
)
NUMBERS: dict[str, Any] = {name: value for value, names in _NAMES for name in names.split()}


_FULL, _SLIDING = "full_attention", "sliding_attention"
_PATTERN = [_SLIDING, _FULL] * (LAYERS // 2)
_YARN = {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": VOCABULARY, "mscale_all_dim": 1.0}
_LINEAR = {"kda_layers": [1, 3], "num_heads": HEADS, "head_dim": HEAD_DIM, "short_conv_kernel_size": 4}
_LINEAR["full_attn_layers"] = [2, 4]
_MLA = {"q_lora_rank": None, "num_experts": HEADS, "num_experts_per_token": 2, "linear_attn_config": _LINEAR}
_MLA |= {
    name: NUMBERS[name] for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
}
_MLA |= {"moe_intermediate_size": 32, "first_k_dense_replace": 1, "attn_res_block_size": None}
_LONGCAT = {"attention_method": "MLA", "zero_expert_type": "identity"}
_BLOCK = {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}}
_THETA = {"rope_theta": 10000.0, "type": "default"}
_SCALED = {**_THETA, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": VOCABULARY}

# Where the language model's configuration is nested: the module and class that read it.
_NESTED: dict[str, tuple[str, str]] = {
    "gemma3": ("gemma3_text", "ModelArgs"),
    "gemma3n": ("gemma3n", "TextConfig"),
    "gemma4": ("gemma4_text", "ModelArgs"),
    "kimi_k25": ("deepseek_v3", "ModelArgs"),
    "kimi_k3": ("kimi_k3", "TextArgs"),
    "kimi_vl": ("kimi_vl", "TextArgs"),
    "lfm2-vl": ("lfm2", "ModelArgs"),
    "llama4": ("llama4", "TextArgs"),
    "minimax_m3_vl": ("minimax_m3_vl", "TextArgs"),
    "mistral3": ("ministral3", "ModelArgs"),
    "muse_spark": ("muse_spark", "TextArgs"),
    "pixtral": ("llama", "ModelArgs"),
    "prism_hadamard_qwen35": ("qwen3_5", "TextModelArgs"),
    "qwen2_vl": ("qwen2", "ModelArgs"),
    "qwen3_5": ("qwen3_5", "TextModelArgs"),
    "qwen3_5_moe": ("qwen3_5", "TextModelArgs"),
    "qwen3_vl": ("qwen3", "ModelArgs"),
    "qwen3_vl_moe": ("qwen3_moe", "ModelArgs"),
}

# By module: what is written beside or over the numbers, into the nested configuration where there is one.
_CORRECTIONS: dict[str, dict[str, Any]] = {
    "Klear": {"mlp_only_layers": [0]},
    "afmoe": {"layer_types": _PATTERN},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": _YARN},
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": _PATTERN, "is_moe_layer": [False, True, True, True]},
    "falcon_h1": {"mamba_d_head": HEAD_DIM},
    "gear": {"layer_types": [_FULL, _SLIDING, "conv", _FULL]},
    "gemma3n": {
        "num_kv_shared_layers": 2,
        "rope_local_base_freq": 10000.0,
        "final_logit_softcapping": 30.0,
        "layer_types": _PATTERN,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "gemma4": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "use_double_wide_mlp": False},
    "gemma4_text": {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "use_double_wide_mlp": False,
    },
    "glm4_moe": {"rope_scaling": None},
    "glm_moe_dsa": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_parameters": _THETA},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan": {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
    "kimi_k3": _MLA,
    "kimi_linear": _MLA,
    "lfm2": {"full_attn_idxs": [1, 3]},
    "lfm2-vl": {"full_attn_idxs": [1, 3]},
    "lfm2_moe": {"full_attn_idxs": [1, 3]},
    "llama4": {"rope_scaling": None, "num_experts_per_tok": 1},
    "llama4_text": {"no_rope_layers": [1, 1, 1, 0], "rope_scaling": None},
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": _LONGCAT,
    "mamba2": {"time_step_limit": [0.0, 100.0], "num_heads": 8},
    "mellum": {"layer_types": _PATTERN, "rope_parameters": {_FULL: _THETA, _SLIDING: _THETA}},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1],
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
    "minicpm3": {"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 4, "short_factor": [1.0] * 4}},
    "minimax_m3_vl": {"moe_layer_freq": [0, 1, 1, 1]},
    "ministral3": {"rope_parameters": _SCALED},
    "mistral3": {"rope_parameters": _SCALED},
    "mistral4": {"rope_parameters": _SCALED},
    "muse_spark": {
        "layer_rope_theta": [10000.0, 0.0] * 2,
        "layer_types": _PATTERN,
        "rope_parameters": _THETA,
        "final_logit_softcapping": 30.0,
        "output_multiplier": 1.0,
        "num_shared_experts": 0,
    },
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {"block_configs": [_BLOCK] * LAYERS},
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "-", "M"], "num_hidden_layers": None},
    "openelm": {"num_query_heads": [4] * 4, "num_kv_heads": [2] * 4, "ffn_multipliers": [1.0, 1.5, 2.0, 2.0]},
    "phi3small": {"vocab_size": 100352},
    "plamo2": {"mamba_num_heads": 8},
    "qwen3_5": {"num_experts": 0},
    "qwen3_moe": {"mlp_only_layers": []},
    "qwen3_next": {"mlp_only_layers": []},
    "qwen3_vl_moe": {"mlp_only_layers": []},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "spark2_5": {"rope_parameters": {_FULL: _THETA, _SLIDING: _THETA}},
}


def models() -> list[str]:
    """Every module of mlx-lm, and of our own, that defines a model, also one that cannot be imported here."""
    names = sorted({*OURS, *(m.name for m in pkgutil.iter_modules(mlx_lm.models.__path__))})
    return [name for name in names if _class(name, "ModelArgs") is not None]


def small_config(name: str) -> dict[str, Any]:
    """A fresh small configuration of one model."""
    nested = _NESTED.get(name)
    own, corrections = _numbers(name, "ModelArgs"), copy.deepcopy(_CORRECTIONS.get(name, {}))
    if nested is None:
        return {**own, **corrections, "model_type": name}
    module, reader = nested
    inner = {**_numbers(module, reader), **corrections, "model_type": module}
    return {**own, "model_type": name, "text_config": inner}


def _numbers(module: str, reader: str) -> dict[str, Any]:
    arguments = _class(module, reader)
    fields = {f.name for f in dataclasses.fields(arguments)} if arguments else set()
    return {key: value for key, value in NUMBERS.items() if key in fields}


def _class(module: str, name: str) -> Any:
    """A class of one of mlx-lm's modules; `()` where that cannot be imported, None where there is no such class."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return getattr(importlib.import_module(f"mlx_lm.models.{module}"), name, None)
    except (Exception, SystemExit):
        return ()
