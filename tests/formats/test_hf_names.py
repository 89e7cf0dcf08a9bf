"""mlx-lm's sanitize applied to the exported layout gives back every tensor, by value."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from support.tiny_models import FAMILIES, OTHER_FAMILIES, tiny_config, tiny_model

from mlx_empire.errors import UserError
from mlx_empire.formats.hf_names import HUGGING_FACE, MLX_LM, choose_layout, naming_problem
from mlx_empire.model.build import build_model, describe, sanitize

OWN = {"gpt_oss", "gpt2", "mamba2"}


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_sanitize_of_the_inverse_is_the_identity(family: str) -> None:
    build, spec = tiny_model(family)
    mx.random.seed(5)
    before = {t.name: mx.random.normal(t.shape) for unit in spec.units for t in unit.tensors}
    layout = choose_layout(spec, build, None)
    assert layout.kind == (MLX_LM if family in OWN else HUGGING_FACE)
    assert bool(layout.notes) == (family in OWN)
    exported = {p.name: p.make(*(before[n] for n in p.takes)) for unit in layout.units for p in unit}
    assert all(exported[p.name].shape == p.shape for unit in layout.units for p in unit)
    after = sanitize(build(), exported, family)
    assert after.keys() == before.keys()
    assert all(mx.array_equal(after[name], before[name]) for name in before)


def names(family: str) -> set[str]:
    build, spec = tiny_model(family)
    return {p.name for unit in choose_layout(spec, build, None).units for p in unit}


def test_names_are_hugging_faces() -> None:
    assert {
        "model.layers.0.mlp.experts.3.down_proj.weight",
        "model.layers.2.mlp.gate.weight",
    } <= names("qwen3_moe")
    assert {
        "model.layers.0.self_attn.kv_b_proj.weight",
        "model.layers.1.mlp.experts.0.up_proj.weight",
    } <= names("deepseek_v3")
    assert "model.layers.3.block_sparse_moe.experts.1.w2.weight" in names("mixtral")
    llama4 = names("llama4")
    assert {
        "language_model.model.layers.1.feed_forward.experts.gate_up_proj",
        "language_model.model.layers.1.feed_forward.experts.down_proj",
        "language_model.model.layers.1.feed_forward.shared_expert.gate_proj.weight",
    } <= llama4
    assert not any(".experts.gate_proj" in name for name in llama4)


def test_a_layout_that_mlx_lm_reads_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some families add 1 to norms whenever they see per-expert names: exporting those would be wrong."""
    build, spec = tiny_model("qwen3_moe")
    model_class = type(build())
    original = model_class.sanitize

    def shifting(self: object, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        raw = any(".experts.0." in name for name in weights)
        clean = original(self, weights)
        return {n: w + 1 if raw and n.endswith("norm.weight") else w for n, w in clean.items()}

    monkeypatch.setattr(model_class, "sanitize", shifting)
    layout = choose_layout(spec, build, None)
    assert layout.kind == MLX_LM
    assert naming_problem(spec, build, layout.units) is None


def test_a_model_that_cannot_be_exported_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    build, spec = tiny_model("llama")
    monkeypatch.setattr(
        type(build()), "sanitize", lambda self, weights: {n: w * 2 for n, w in weights.items()}
    )
    with pytest.raises(UserError, match="cannot be exported"):
        choose_layout(spec, build, None)


BAICHUAN = {
    **tiny_config("llama"),
    "model_type": "baichuan_m1",
    "sliding_window": 32,
    "sliding_window_layers": [1, 3],
    "conv_window": 2,
    "num_swa_attention_heads": 4,
    "num_swa_key_value_heads": 2,
}
MINICPM = {
    **tiny_config("llama"),
    "model_type": "minicpm",
    "dim_model_base": 32,
    "scale_depth": 1.4,
    "scale_emb": 12,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (BAICHUAN, "lm_head.weight comes back with other values"),
        (
            {**BAICHUAN, "vocab_size": 4096},
            "lm_head.weight comes back with other values",
        ),  # too large to compare
        (MINICPM, "lm_head.weight is no part of its model"),
        (
            {"model_type": "qwen3_vl_moe", "text_config": tiny_config("qwen3_moe", tie_word_embeddings=True)},
            "mlx-lm cannot map its tensors to the model",
        ),
    ],
    ids=["changed", "changed and large", "another tensor", "fails"],
)
def test_what_mlx_lm_does_not_read_back_is_refused_before_training(
    config: dict[str, Any], why: str, tmp_path: Path
) -> None:
    """mlx-lm's own loader is the judge: it gives back other weights, or none."""
    build = partial(build_model, config, "brain")
    model = build()
    spec = describe(model, config, "brain", "float32")
    with pytest.raises(UserError, match=f"brain: a trained one cannot be exported, .* tensors back: .*{why}"):
        choose_layout(spec, build, None)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights, {"format": "mlx"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        loaded, _ = load_model(tmp_path)
    except (KeyError, ValueError):
        return
    found = dict(tree_flatten(loaded.parameters()))
    assert any(not mx.array_equal(found[name], w).item() for name, w in weights.items())
