"""Which parameters decay, on names of mlx-lm models."""

from __future__ import annotations

import pytest

from mlx_empire.optim.protocol import decays


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (100, 8)),
        ("lm_head.weight", (100, 8)),
        ("model.layers.0.self_attn.q_proj.weight", (8, 8)),
        ("model.layers.0.mlp.switch_mlp.gate_proj.weight", (4, 8, 8)),
        ("model.layers.0.mlp.gate.weight", (4, 8)),
        ("model.layers.3.normalizer_proj.weight", (8, 8)),
    ],
)
def test_matrices_and_embeddings_decay(name: str, shape: tuple[int, ...]) -> None:
    assert decays(name, shape)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.norm.weight", (8,)),
        ("model.layers.0.input_layernorm.weight", (8,)),
        ("model.layers.0.self_attn.q_norm.weight", (2, 8)),
        ("transformer.h.0.ln_1.weight", (1, 8)),
        ("model.layers.0.self_attn.kv_a_layernorm.weight", (1, 8)),
        ("model.layers.0.self_attn.q_proj.bias", (8,)),
        ("model.layers.0.mlp.experts.gate_proj.bias", (4, 8)),
        ("model.layers.0.mlp.gate.e_score_correction_bias", (4,)),
        ("model.layers.0.mlp.gate.e_score_correction_bias", (1, 4)),
        ("model.layers.0.self_attn.sinks", (4,)),
        ("scalar", ()),
    ],
)
def test_norms_biases_and_vectors_do_not(name: str, shape: tuple[int, ...]) -> None:
    assert not decays(name, shape)
