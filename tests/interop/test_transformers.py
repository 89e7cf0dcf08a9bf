"""Exported folders opened by transformers on torch: the layout is Hugging Face's own.

Needs torch, which `make test` does not install: run it by `make test-interop`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model
from support.tiny_models import tiny_config, tiny_model

from mlx_empire.formats.export_folder import FolderWriter
from mlx_empire.formats.source import FolderSource, RandomSource, WeightSource
from mlx_empire.model.spec import ModelSpec

torch = pytest.importorskip("torch", reason="torch is not installed: run `make test-interop`")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TOKENS = [[5, 9, 250, 17, 3, 3, 0, 88], [1, 2, 3, 4, 5, 6, 7, 8]]
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {"tie_word_embeddings": True, "hidden_act": "gelu_python"},  # mlx-lm has the exact gelu
    "gemma2": {"tie_word_embeddings": True},
    "phi3": {},
    "olmo2": {},
    "cohere2": {"tie_word_embeddings": True, "sliding_window": 64},
    "qwen3_moe": {},
    "mixtral": {},
    "deepseek_v3": {},
    "starcoder2": {"tie_word_embeddings": True, "hidden_act": "gelu_python"},
    "mistral": {"model_type": "mistral"},
    "gemma3_text": {"rope_local_base_freq": 10000.0},
}


def export(source: WeightSource, spec: ModelSpec, writer: FolderWriter, noise: float = 0.0) -> None:
    """Write every unit; `noise` makes zero and one weights (routers, norms) differ."""
    with writer:
        for index in range(len(spec.units)):
            unit = {t.name: a + noise * mx.random.normal(a.shape) for t, a in source.unit(index)}
            writer.write_unit(index, unit)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_logits(family: str, tmp_path: Path) -> None:
    base = "llama" if family == "mistral" else family
    build, spec = tiny_model(base, **SPECIAL, **FAMILIES[family])
    out = tmp_path / "out"
    export(RandomSource(build, spec, seed=2), spec, FolderWriter(out, spec, build), noise=0.1)
    expected = np.array(load_model(out)[0](mx.array(TOKENS)))
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        found = model.eval()(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(expected).max() > 0.1
    assert np.abs(found - expected).max() < 1e-4


def test_a_folder_saved_by_transformers_comes_back_equal(tmp_path: Path) -> None:
    """Written by transformers, read and exported here: every tensor keeps its name and bits."""
    for family in ("llama", "qwen3_moe", "mixtral", "deepseek_v3"):
        config = tiny_config(family, **SPECIAL)
        settings = transformers.AutoConfig.for_model(**config)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(settings).float()
        folder, out = tmp_path / family, tmp_path / f"{family}-out"
        model.save_pretrained(folder)
        build, spec = tiny_model(family, **SPECIAL)
        export(FolderSource(folder, build, spec), spec, FolderWriter(out, spec, build, folder))
        before = {n: a for f in folder.glob("*.safetensors") for n, a in mx.load(str(f)).items()}
        after = {n: a for f in out.glob("*.safetensors") for n, a in mx.load(str(f)).items()}
        assert before.keys() == after.keys()
        assert all(mx.array_equal(before[n], after[n]) for n in before)


VISION = {
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 14,
    "vision_output_dim": 48,
    "projector_input_dim": 48,
    "projector_output_dim": 48,
    "pixel_shuffle_ratio": 0.5,
}


def test_llama4_with_its_vision_tower_comes_back_whole(tmp_path: Path) -> None:
    """transformers' own Llama 4, vision tower included: read, exported, and opened by transformers again."""
    settings = transformers.Llama4Config(
        text_config=tiny_config("llama4", **SPECIAL)["text_config"], vision_config=VISION
    )
    torch.manual_seed(0)
    original = transformers.Llama4ForConditionalGeneration(settings).float().eval()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder, out = tmp_path / "source", tmp_path / "out"
    original.save_pretrained(folder)
    build, spec = tiny_model("llama4", **SPECIAL)
    saved = json.loads((folder / "config.json").read_text())
    saved["text_config"] |= {"rope_theta": 10000.0, "rope_scaling": None}  # mlx-lm reads the older keys
    spec = ModelSpec(spec.name, spec.family, spec.dtype, spec.units, saved)
    export(FolderSource(folder, build, spec), spec, FolderWriter(out, spec, build, folder))
    before = {n: a for f in folder.glob("*.safetensors") for n, a in mx.load(str(f)).items()}
    after = {n: a for f in out.glob("*.safetensors") for n, a in mx.load(str(f)).items()}
    assert any(name.startswith("vision_model") for name in before)
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[n], after[n]) for n in before)
    model, report = transformers.Llama4ForConditionalGeneration.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        found = model.eval()(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(found - np.array(load_model(out)[0](mx.array(TOKENS)))).max() < 1e-4
