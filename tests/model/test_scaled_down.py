"""The scaled-down configuration keeps the relations between a configuration's numbers, whatever these are."""

from __future__ import annotations

from typing import Any

import pytest
from support import published

from mlx_empire.errors import UserError
from mlx_empire.model.scaled_down import scaled_down_config

# (a, b): where b divides a, it does so in the small configuration; where they are equal, they stay equal.
DIVIDING = (
    ("num_attention_heads", "num_key_value_heads"),
    ("num_attention_heads", "num_global_key_value_heads"),
    ("num_attention_heads", "num_attention_groups"),
    ("swa_num_attention_heads", "swa_num_key_value_heads"),
    ("linear_num_value_heads", "linear_num_key_heads"),
    ("mamba_num_heads", "n_groups"),
    ("num_heads", "n_groups"),
    ("hidden_size", "num_attention_heads"),
    ("n_embd", "n_head"),
)
# A width that is so many heads of such a size stays so.
PRODUCTS = (
    ("hidden_size", "num_attention_heads", "head_dim"),
    ("mamba_d_ssm", "mamba_n_heads", "mamba_d_head"),
    ("intermediate_size", "num_heads", "head_dim"),
)
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_transformer_layers")


def section(config: dict[str, Any]) -> dict[str, Any]:
    return dict(config.get("text_config", config))


# mlx-lm computes them otherwise than their own code, so they are refused (`mlx_empire/model/unread.py`).
REFUSED = {"falcon-h1-1.5b": "attention_in_multiplier|key_multiplier", "mamba2-codestral-7b": "n_groups"}


@pytest.mark.parametrize(("name", "key"), REFUSED.items())
def test_published_models_that_would_be_others_are_refused_by_key(name, key):
    with pytest.raises(UserError, match=key):
        published.config_of(name)


@pytest.mark.parametrize("name", [name for name in published.names() if name not in REFUSED])
def test_what_published_numbers_are_to_each_other_they_stay(name):
    whole = published.config_of(name)
    large, small = section(whole), section(scaled_down_config(whole))
    for a, b in DIVIDING:
        if large.get(a) and large.get(b):
            assert (small[a] == small[b]) == (large[a] == large[b]) or small[b] == 1, (a, b)
            assert large[a] % large[b] or small[a] % small[b] == 0, (a, b)
    for width, heads, size in PRODUCTS:
        if all(large.get(key) for key in (width, heads, size)) and large[width] == large[heads] * large[size]:
            assert small[width] == small[heads] * small[size], width
    layers = next(key for key in LAYERS if key in large)
    assert small[layers] == min(large[layers], 12)
    for key, value in large.items():
        if isinstance(value, list) and len(value) == large[layers]:
            assert len(small[key]) == small[layers], key
    assert small.get("num_experts_per_tok") is None or small["num_experts_per_tok"] <= 2


def test_heads_by_layer_and_by_group_keep_their_ratio():
    small = scaled_down_config(published.config_of("openelm-1.1b"))
    assert {q // kv for q, kv in zip(small["num_query_heads"], small["num_kv_heads"], strict=True)} == {4}
    block = {"attention": {"n_heads_in_group": 8}, "ffn": {"ffn_mult": 2.625}}
    wide = {"hidden_size": 8192, "num_attention_heads": 64, "block_configs": [block], "rms_norm_eps": 1e-5}
    small = scaled_down_config({"model_type": "nemotron-nas", **wide})
    (kept,) = small["block_configs"]
    assert small["num_attention_heads"] % kept["attention"]["n_heads_in_group"] == 0
    assert (kept["ffn"], small["rms_norm_eps"]) == (block["ffn"], 1e-5)


def test_a_pattern_of_letters_is_cut_with_the_layers_and_names_are_not():
    config = published.config_of("nemotron-h-8b")
    small = scaled_down_config({**config, "_name_or_path": "x" * config["num_hidden_layers"]})
    assert small["hybrid_override_pattern"] == config["hybrid_override_pattern"][:12]
    assert len(small["_name_or_path"]) == config["num_hidden_layers"]


def test_rotary_parts_stay_even():
    sizes = {
        "hidden_size": 12288,
        "num_attention_heads": 64,
        "head_dim": 192,
    }  # the largest divisor would leave 5 of 16
    small = scaled_down_config({"model_type": "glm4", "partial_rotary_factor": 0.334, **sizes})
    assert int(small["head_dim"] * small["partial_rotary_factor"]) == 8


def test_a_tower_has_ratios_of_its_own():
    tower = {"hidden_size": 1152, "num_attention_heads": 16, "num_hidden_layers": 27}
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34}
    small = scaled_down_config({"model_type": "gemma3", "text_config": text, "vision_config": tower})
    assert small["vision_config"] == {"hidden_size": 72, "num_attention_heads": 4, "num_hidden_layers": 12}


@pytest.mark.parametrize(
    "number", [-5, 0, 10**18, 2**127 - 1, float("nan"), float("inf"), "wide", None, True, [], {}]
)
@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "head_dim", "partial_rotary_factor"])
def test_any_value_ends_in_a_configuration(key, number):
    """Whether it is a model is for mlx-lm to say."""
    scaled_down_config({"model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 8, key: number})


def test_a_vocabulary_can_be_kept():
    config = published.config_of("llama-3.1-8b")
    assert scaled_down_config(config)["vocab_size"] == 256
    assert scaled_down_config(config, whole_vocabulary=True)["vocab_size"] == 128256
