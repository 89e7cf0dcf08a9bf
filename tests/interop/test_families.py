"""Folders that transformers saves, family by family and key by key: torch's loss, or a refusal of ours by name.

The product's own path reads each folder: configuration, target, source; a row that is longer than a window counts.
Weights are large, so that what a key changes shows in the loss. Needs torch: run it by `make test-interop`.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.utils import load_model

from mlx_empire.errors import UserError
from mlx_empire.formats.export_folder import FolderWriter
from mlx_empire.formats.hf_folder import open_folder
from mlx_empire.formats.source import FolderSource
from mlx_empire.model.config import read_config
from mlx_empire.model.target import make_target
from mlx_empire.model.unread import refuse_row_length
from mlx_empire.recipe.sections import TuningSection

torch = pytest.importorskip("torch", reason="torch is not installed: run `make test-interop`")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

ROWS = [[1 + (31 * i * i + 7 * j * j + 3 * i * j) % 250 for j in range(49)] for i in range(2)]  # 0 pads
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "mamba_d_ssm"), 64),
    **dict.fromkeys(("vocab_size", "n_positions", "max_seq_len", "max_position_embeddings"), 256),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layers", "n_layer", "num_attention_heads", "n_heads", "n_head"), 4
    ),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "v_head_dim", "qk_nope_head_dim", "query_pre_attn_scalar", "kv_lora_rank"), 16
    ),
    **dict.fromkeys(("q_lora_rank", "mamba_d_state", "state_size", "ssm_state_size", "mamba_d_head"), 16),
    **dict.fromkeys(("mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("intermediate_size", "block_ff_dim"), 96),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 48
    ),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_groups"), 1),
    **dict.fromkeys(
        ("mamba_n_groups", "n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"), 1
    ),
    **dict.fromkeys(("sliding_window", "mamba_chunk_size", "chunk_size"), 32),
    **{"qk_rope_head_dim": 8, "time_step_rank": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
MLA = {"head_dim": 8, "num_key_value_heads": 4}
NO_WINDOW = {"sliding_window": None}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
FULL = {"layer_types": ["full_attention"] * 4}
GPT_OSS_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1.5e5,
    "factor": 32.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 0.3 * i for i in range(8)],
}
BIASES = {"attention_bias": True, "lm_head_bias": True}
# family -> what it needs besides SIZES
PLAIN = (
    "afmoe apertus cohere cohere2 dots1 ernie4_5 exaone_moe falcon falcon_h1 falcon_mamba gemma gemma3_text "
    "gemma4_text glm4 glm4_moe gpt2 granite granitemoe helium hunyuan_v1_dense internlm3 laguna llama mamba "
    "mellum minimax_m2 nemotron nemotron_h olmo olmo2 olmo3 olmoe phi qwen2 qwen2_moe qwen3 qwen3_moe seed_oss "
    "smollm3 solar_open stablelm"
)
FAMILIES: dict[str, dict[str, Any]] = {
    **{family: {} for family in PLAIN.split()},
    **{family: NO_WINDOW for family in ("mistral", "ministral3", "phi3", "starcoder2")},
    "mixtral": {"head_dim": None, **NO_WINDOW},
    "gemma2": FULL,
    "gpt_bigcode": {"n_inner": 96},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    **{family: {**MLA, **DENSE_FIRST} for family in ("deepseek_v32", "glm4_moe_lite")},
    "exaone4": {"sliding_window_pattern": None},
    "gpt_neox": {"intermediate_size": 256},
    "gpt_oss": {"rope_parameters": {**GPT_OSS_YARN, "truncate": True}},  # mlx-lm always rounds yarn's limits
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8},
    "jamba": {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "olmo_hybrid": {
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_num_key_heads": 4,
    },
    "phimoe": {**BIASES, **NO_WINDOW},
    "qwen3_next": {"layer_types": ["linear_attention"] * 3 + ["full_attention"]},
}


def longrope(original: int) -> dict[str, Any]:
    name = "original_max_position_embeddings"
    return {"rope_parameters": {**LONG, name: original}, name: original, **NO_WINDOW}


LAYERED = ("layer_types", "mlp_layer_types")
# One key is changed: torch's loss changes with it, and the folder is read or refused.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *[(f, {"tie_word_embeddings": True}) for f in ("llama", "mistral", "mixtral", "qwen2", "qwen3", "olmo2")],
    *[
        (f, {"hidden_act": "relu"})
        for f in ("llama", "qwen3", "glm4", "olmo3", "nemotron", "mamba2", "afmoe")
    ],
    *[
        (f, {"sliding_window": 8})
        for f in ("mistral", "mixtral", "phi3", "starcoder2", "ministral3", "cohere2")
    ],
    *[(f, {"attention_bias": True}) for f in ("llama", "qwen3", "qwen3_moe", "gemma", "granite", "dots1")],
    *[(f, {"num_experts_per_tok": 1}) for f in ("mixtral", "deepseek_v3", "glm4_moe", "qwen3_moe", "olmoe")],
    *[(f, {"norm_topk_prob": v}) for f, v in (("qwen2_moe", True), ("qwen3_moe", False), ("olmoe", True))],
    ("deepseek_v3", {"n_routed_experts": 16, "n_group": 4, "topk_group": 2}),
    ("deepseek_v3", {"rope_interleave": False}),
    ("falcon_h1", {"key_multiplier": 0.4}),
    ("gemma2", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    ("gemma3_text", {"final_logit_softcapping": 5.0}),
    ("gemma3_text", {"use_bidirectional_attention": True}),
    ("gpt_bigcode", {"scale_attn_weights": False}),
    ("gpt_oss", {"swiglu_limit": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    ("granite", {"logits_scaling": 3.0, "residual_multiplier": 0.5}),
    ("granitemoehybrid", {"layer_types": ["attention"] * 4, "num_local_experts": 0}),
    ("jamba", {"num_experts": 4}),
    ("laguna", {"gating": False}),
    ("laguna", {"gating": "per-element"}),
    ("llama", {"mlp_bias": True}),
    ("llama4_text", {"num_experts_per_tok": 1, "intermediate_size_mlp": 96}),
    ("mamba2", {"n_groups": 2}),
    *[(f, {"clip_qkv": 0.3}) for f in ("olmo", "olmoe")],
    ("falcon", {"multi_query": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"parallel_attn": False, "bias": True}),
    ("phi", {"qk_layernorm": True}),
    *[("phi3", longrope(original)) for original in (47, 48)],
    ("phimoe", {"attention_bias": False}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"] * 2}),
]


def settings(family: str, **changes: Any) -> Any:
    """transformers' configuration of a tiny model."""
    there = transformers.CONFIG_MAPPING[family]
    held = there().to_dict()
    sizes = {k: v for k, v in SIZES.items() if k in held and not isinstance(held[k], bool | dict)}
    for key in LAYERED:
        if isinstance(held.get(key), list):
            kinds = list(dict.fromkeys(held[key]))
            sizes[key] = (kinds * 4)[:4]
    return there(**{**sizes, **FAMILIES.get(family, {}), **changes})


def torch_model(config: Any, kind: Any = transformers.AutoModelForCausalLM) -> Any:
    torch.manual_seed(0)
    model = kind.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or "A_log" in name or "conv" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.std() < 0.05:
                parameter.mul_(8.0).add_(0.15 * torch.randn_like(parameter) * (parameter.std() < 1e-6))
        for name, buffer in model.named_buffers():
            if "bias" in name and buffer.dtype.is_floating_point:
                buffer.add_(0.05 * torch.randn_like(buffer))
    return model


def torch_loss(model: Any) -> float:
    tokens = torch.tensor(ROWS)
    with torch.no_grad():
        logits = model(tokens[:, :-1], use_cache=False).logits.float()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def our_loss(folder: Path) -> float:
    """The first loss, through the product's own reading. UserError."""
    config, stored = read_config(folder), open_folder(folder).stored()
    refuse_row_length(config, len(ROWS[0]) - 1, folder.name)
    target = make_target(config, TuningSection(), folder.name, "float32", stored)
    source = FolderSource(folder, target.rebuild, target.base)
    for index in range(len(target.spec.units)):
        target.model.load_weights([(t.name, array) for t, array in source.unit(index)], strict=False)
    return mlx_loss(target.model)


def mlx_loss(model: nn.Module) -> float:
    tokens = mx.array(ROWS)
    logits = model.eval()(tokens[:, :-1]).astype(mx.float32)
    return float(nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_first_loss_of_a_saved_folder_is_that_of_torch(family: str, dtype: str, tmp_path: Path) -> None:
    folder = tmp_path / family
    torch_model(settings(family)).to(getattr(torch, dtype)).save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    assert our_loss(folder) == pytest.approx(torch_loss(model.eval()), rel=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_is_exported_has_the_same_loss_in_mlx_lm(family: str, tmp_path: Path) -> None:
    """mlx-lm reads the exported configuration by itself: what was completed here stands in it."""
    folder, out = tmp_path / family, tmp_path / "out"
    torch_model(settings(family)).save_pretrained(folder)
    target = make_target(
        read_config(folder), TuningSection(), folder.name, "float32", open_folder(folder).stored()
    )
    source = FolderSource(folder, target.rebuild, target.spec)
    with FolderWriter(out, target.spec, target.rebuild, folder) as writer:
        for index in range(len(target.spec.units)):
            writer.write_unit(index, {t.name: array for t, array in source.unit(index)})
    with contextlib.redirect_stdout(io.StringIO()):  # some of its modules print
        theirs = load_model(out)[0]
    assert mlx_loss(theirs) == pytest.approx(our_loss(folder), rel=1e-5)


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=lambda value: str(value)[:60])
def test_a_key_is_read_or_refused_by_name(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = torch_model(settings(family, **changes))
    model.save_pretrained(tmp_path / family)
    found: float | str
    try:
        found = our_loss(tmp_path / family)
    except UserError as error:
        found = str(error)
    if isinstance(found, str):
        assert family in found  # one line that names the folder
        assert "\n" not in found
    else:
        assert found == pytest.approx(torch_loss(model), rel=1e-4)
