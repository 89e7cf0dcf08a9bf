"""Keys in the names that mlx-lm's module reads, and what it would leave out: one folder of each kind.

Whether the losses are torch's is asked by tests/interop/test_families.py.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models
import pytest
from mlx_lm.utils import load_config
from support import published
from support.every_module import names, reader
from support.planning import recipe_of
from support.tiny_models import tiny_config
from transformers import CONFIG_MAPPING

from mlx_empire.errors import UserError
from mlx_empire.formats.staging import stored_config
from mlx_empire.model.build import build_model, compute_dtype
from mlx_empire.model.config import complete, read_config
from mlx_empire.model.family_defaults import OTHERS
from mlx_empire.model.target import planned_target
from mlx_empire.model.unread import LEARNT_POSITIONS, UNREAD

# What transformers' class has built in, so that its configuration has no such key.
BUILT_IN = {
    "apertus",
    "glm_moe_dsa",
    "longcat_flash",
    "mimo_v2_flash",
    "minimax_m2",
    "qwen3_vl_moe_text",
    "solar_open",
}


def folder_of(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("family", sorted(OTHERS))
def test_other_defaults_are_those_of_transformers(family: str) -> None:
    there = CONFIG_MAPPING[family]
    held = {key: value for key, value in OTHERS[family].items() if hasattr(there, key)}
    assert held or family in BUILT_IN
    assert {key: getattr(there, key) for key in held} == held
    assert held == OTHERS[family] or family in BUILT_IN


@pytest.mark.parametrize("name", ["gemma-3-4b-it", "gemma-3-12b-it"])
def test_heads_of_a_size_of_their_own_are_not_taken_for_the_widths_part(name: str) -> None:
    """Their configurations say no head_dim, and it is not hidden_size / num_attention_heads (320 and 240)."""
    assert published.config_of(name)["text_config"]["head_dim"] == 256


@pytest.mark.parametrize("tag", ["Infinity", "inf", "-Infinity"])
def test_tagged_floats_are_numbers_and_are_tagged_again(tag: str, tmp_path: Path) -> None:
    config = tiny_config("mamba2", time_step_limit=[0.0, {"__float__": tag}])
    found = read_config(folder_of(tmp_path / "f", config))
    assert found["time_step_limit"] == [0.0, -math.inf if tag.startswith("-") else math.inf]
    written = stored_config(found, "float32")
    json.dumps(written, allow_nan=False)
    assert load_config(folder_of(tmp_path / "out", written))["time_step_limit"] == found["time_step_limit"]


@pytest.mark.parametrize(
    ("key", "said", "computes"),
    [
        ("torch_dtype", "torch.bfloat16", "bfloat16"),
        ("dtype", "bf16", "bfloat16"),
        ("dtype", "float16", "float32"),
        ("torch_dtype", "half", "float32"),
        (None, "", "bfloat16"),  # as its tensors are stored
    ],
)
def test_dtypes_by_any_name_and_without_one(
    key: str | None, said: str, computes: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "f", {**tiny_config("llama"), **({key: said} if key else {})})
    tensors = {
        "model.embed_tokens.weight": mx.zeros((256, 64), mx.bfloat16),
        "model.norm.weight": mx.ones((64,)),
    }
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    assert compute_dtype(read_config(folder), None) == computes


ALIASED = {
    "qwen3_moe": ("num_experts", "num_local_experts", 4),
    "gpt2": ("n_ctx", "n_positions", 256),
    "lfm2": ("block_dim", "hidden_size", 64),
}


@pytest.mark.parametrize("family", ALIASED)
def test_a_key_is_found_under_transformers_name(family: str) -> None:
    key, other, value = ALIASED[family]
    config = tiny_config(family)
    config.pop(key)
    assert complete({**config, other: value}, "folder")[key] == value


def test_numbers_that_follow_from_others_are_derived() -> None:
    def without(family: str, key: str, **more: Any) -> Any:
        config = {k: v for k, v in tiny_config(family).items() if k != key}
        return complete({**config, **more}, "folder")[key]

    assert without("glm4_moe", "head_dim") == 16
    assert without("gemma", "head_dim") == 256  # fixed in transformers, whatever the width is
    assert without("mamba2", "intermediate_size") == 128
    assert without("lfm2", "full_attn_idxs", layer_types=["conv", "full_attention"] * 2) == [1, 3]
    kinds = ["linear_attention", "full_attention"] * 2
    assert without("qwen3_next", "full_attention_interval", layer_types=kinds) == 2


def test_a_granite_hybrid_as_transformers_5_writes_it_is_the_same_model() -> None:
    """Layers by its general names; without experts a layer has the shared MLP alone."""
    config = tiny_config("granitemoehybrid")
    kinds = ["linear_attention", "full_attention"] * 2
    dense = {"num_local_experts": 0, "shared_intermediate_size": 48, "intermediate_size": 96}
    assert complete({**config, "layer_types": kinds}, "folder")["layer_types"] == ["mamba", "attention"] * 2
    assert complete({**config, **dense}, "folder")["intermediate_size"] == 48
    assert complete({**config, **dense, "num_local_experts": 4}, "folder")["intermediate_size"] == 96


LEFT_OUT = {
    "another activation": ("llama", {"hidden_act": "gelu"}, "hidden_act: gelu"),
    "normalised weights": ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob: True"),
    "groups of a norm": ("mamba2", {"n_groups": 2}, "n_groups: 2"),
    "halves of RoPE": ("deepseek_v3", {"rope_interleave": False}, "rope_interleave: False"),
    "capped logits": ("gemma3_text", {"final_logit_softcapping": 5.0}, "final_logit_softcapping: 5.0"),
    "clipped projections": ("olmoe", {"clip_qkv": 0.3}, "clip_qkv: 0.3"),
    "both directions": ("llama", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "one expert alone": ("deepseek_v3", {"num_experts_per_tok": 1}, "norm_topk_prob: True"),
    "another clamp": ("gpt_oss", {"swiglu_limit": 1.0}, "swiglu_limit: 1.0"),
    "scores without a cap": ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping: null"),
    "rounded activations": ("llama", {"quantize_activations": True}, "quantize_activations"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_the_module_would_leave_out_is_refused_by_name(case: str) -> None:
    family, changes, words = LEFT_OUT[case]
    complete(tiny_config(family), "folder")
    with pytest.raises(UserError, match=words):
        complete(tiny_config(family, **changes), "folder")


def test_refused_keys_are_none_that_the_module_reads() -> None:
    """But for those that it reads and applies otherwise."""
    assert set(UNREAD) <= set(names())
    found = {(module, key) for module, keys in UNREAD.items() for key in keys if key in reader(module)}
    assert found == {
        ("falcon_h1", "attention_in_multiplier"),
        ("falcon_h1", "key_multiplier"),
        ("gpt_bigcode", "multi_query"),
        ("jamba", "num_experts"),
        ("laguna", "gating"),
        ("mamba2", "n_groups"),
    }


@pytest.mark.parametrize(
    ("family", "changes", "refused"),
    [
        ("mistral", {"sliding_window": 64}, True),
        ("mistral", {"sliding_window": 256}, False),
        ("mistral", {"sliding_window": None}, False),
        ("gemma2", {"sliding_window": 64}, True),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True}, True),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, False),
        ("qwen3", {"sliding_window": 64, "layer_types": ["full_attention"] * 4}, False),
        ("gemma3_text", {"sliding_window": 64}, False),  # has one
    ],
)
def test_rows_longer_than_a_window_that_mlx_lm_lacks_are_refused(
    family: str, changes: dict[str, Any], refused: bool, tmp_path: Path
) -> None:
    base = "llama" if family == "mistral" else family
    config = {**tiny_config(base), "model_type": family, **changes}
    folder = folder_of(tmp_path / "f", config)
    found = planned_target(recipe_of(f"model.path={folder}", "data.sequence_length=256")).not_trainable
    assert (found is not None and "sliding window of 64 tokens" in found) is refused


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 256,
}


@pytest.mark.parametrize(
    ("length", "changes", "refused"),
    [
        (256, {}, True),
        (257, {}, False),
        (256, {"short_factor": [2.0] * 8}, False),  # mlx-lm's long ones are those of short rows too
    ],
)
def test_rows_for_which_longrope_has_short_factors_are_refused(
    length: int, changes: dict[str, Any], refused: bool, tmp_path: Path
) -> None:
    """transformers chooses by the row's length; mlx-lm takes the long ones for all."""
    config = tiny_config("phi3", max_position_embeddings=512, rope_scaling={**LONGROPE, **changes})
    folder = folder_of(tmp_path / "f", config)
    found = planned_target(recipe_of(f"model.path={folder}", f"data.sequence_length={length}")).not_trainable
    assert (found is not None and "factors of its own for rows up to 256 tokens" in found) is refused


@pytest.mark.parametrize("family", LEARNT_POSITIONS)
@pytest.mark.parametrize(("length", "refused"), [(256, False), (257, True)])
def test_rows_longer_than_the_table_of_positions_are_refused(
    family: str, length: int, refused: bool, tmp_path: Path
) -> None:
    """MLX does not look at the bounds of a table: the process would read foreign memory, or abort."""
    folder = folder_of(tmp_path / "f", tiny_config(family, n_positions=256))
    found = planned_target(recipe_of(f"model.path={folder}", f"data.sequence_length={length}")).not_trainable
    assert (found is not None and "has learnt 256 positions and no more" in found) is refused


def test_these_are_the_families_that_have_such_a_table() -> None:
    sources = Path(mlx_lm.models.__path__[0]).glob("*.py")
    tables = {s.stem for s in sources if re.search(r"nn\.Embedding\([^)]*position", s.read_text("utf-8"))}
    assert tables == set(LEARNT_POSITIONS)


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_a_wrapped_language_model_keeps_its_own_vocabulary(family: str) -> None:
    """mlx-lm's wrapper takes a vocab_size beside text_config, and 262,144 where there is none."""
    config = tiny_config(family)
    text = {**config["text_config"], "vocab_size": 320}
    for beside in ({}, {"vocab_size": 512}):
        bare = {k: v for k, v in config.items() if k != "vocab_size"}
        model = build_model(complete({**bare, "text_config": text, **beside}, "f"), "f")
        assert model.language_model.model.embed_tokens.weight.shape[0] == 320


def test_a_text_model_that_mlx_lm_reads_by_another_name_is_told_so() -> None:
    with pytest.raises(UserError, match=r"with model_type: qwen3_5 in config\.json it is"):
        build_model({"model_type": "qwen3_5_text"}, "f")


@pytest.mark.parametrize(
    ("family", "key", "module"),
    [
        ("seed_oss", "attention_bias", "self_attn.q_proj"),
        ("granitemoehybrid", "mamba_conv_bias", "mamba.conv1d"),
    ],
)
@pytest.mark.parametrize(("stored", "expected"), [((), True), (("bias",), True), (("weight",), False)])
def test_a_silent_configuration_has_the_biases_that_are_stored(
    family: str, key: str, module: str, stored: tuple[str, ...], expected: bool
) -> None:
    """transformers leaves out what is its default, and mlx-lm's users what is mlx-lm's."""
    config = {k: v for k, v in tiny_config(family).items() if k != key}
    names = [f"model.layers.0.{module}.{kind}" for kind in stored]
    assert complete(config, "folder", names)[key] is expected


def test_a_key_without_a_name_is_the_name_of_no_other() -> None:
    """Byte errors in a config.json once made hidden_size null and another key empty."""
    config = {**tiny_config("llama"), "": 5, "hidden_size": None}
    assert complete(config, "here").get("hidden_size") is None
