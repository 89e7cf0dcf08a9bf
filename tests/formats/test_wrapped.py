"""Vision-language folders as published: the language model is trained, the towers beside it come back unchanged.

References are the names that the publishers' folders have, and mlx-lm's own loading.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from formats.test_export_folder import Write, export_all, stored_bytes
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from support.tiny_models import tiny_config

from mlx_empire.formats.export_folder import FolderWriter
from mlx_empire.formats.hf_folder import open_folder
from mlx_empire.formats.hf_names import HUGGING_FACE, choose_layout, huggingface_names
from mlx_empire.formats.peft import from_peft, no_peft_form, peft_config, peft_weights
from mlx_empire.formats.source import FolderSource
from mlx_empire.model.build import build_model
from mlx_empire.model.config import read_config
from mlx_empire.model.target import Target, make_target
from mlx_empire.recipe.sections import TuningSection

TOKENS = mx.array([[1, 7, 200, 31, 4]])
NEW, OLD, BARE = "model.language_model.", "language_model.model.", "model."
# family -> where the publisher puts the language model, and its head, and tensors beside them
PUBLISHED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "qwen3_vl": (NEW, "lm_head.", ("model.visual.blocks.0.attn.qkv.weight", "model.visual.merger.norm.bias")),
    "qwen2_vl": (BARE, "lm_head.", ("visual.blocks.0.attn.qkv.weight", "visual.merger.ln_q.weight")),
    "gemma3": (
        OLD,
        "language_model.lm_head.",
        ("vision_tower.vision_model.head.weight", "multi_modal_projector.w"),
    ),
    "mistral3": (
        NEW,
        "lm_head.",
        ("model.vision_tower.ln_pre.weight", "model.multi_modal_projector.norm.weight"),
    ),
}


def published(family: str, write_folder: Write) -> Path:
    """A made-up folder with the publisher's names."""
    config = tiny_config(family)
    config["vision_config"] = {"hidden_size": 48}
    prefix, head, beside = PUBLISHED[family]
    mx.random.seed(3)
    tensors = {}
    for name, array in tree_flatten(build_model(config, family).parameters()):
        inner = name.removeprefix("language_model.")
        spelled = prefix + inner.removeprefix("model.") if inner.startswith("model.") else head + inner[8:]
        tensors[spelled] = array.astype(mx.float32)
    tensors |= {name: mx.random.normal((6, 4)).astype(mx.bfloat16) for name in beside}
    return write_folder({**config, "torch_dtype": "float32"}, tensors)


def target(folder: Path, **tuning: Any) -> Target:
    stored = open_folder(folder).stored()
    return make_target(read_config(folder), TuningSection(**tuning), str(folder), "float32", stored)


@pytest.mark.parametrize("family", PUBLISHED)
def test_towers_come_back_unchanged_beside_the_language_model(
    family: str, write_folder: Write, tmp_path: Path
) -> None:
    folder = published(family, write_folder)
    built = target(folder)
    writer = FolderWriter(tmp_path / "out", built.spec, built.rebuild, folder)
    export_all(writer, FolderSource(folder, built.rebuild, built.spec), built.spec)
    assert stored_bytes(tmp_path / "out") == stored_bytes(folder)
    assert set(writer.not_trained) == set(PUBLISHED[family][2])
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["vision_config"] == {"hidden_size": 48}
    before, after = load_model(folder)[0], load_model(tmp_path / "out")[0]
    assert mx.array_equal(before(TOKENS), after(TOKENS))


@pytest.mark.parametrize("family", PUBLISHED)
def test_its_layout_is_hugging_faces(family: str, write_folder: Write) -> None:
    folder = published(family, write_folder)
    built = target(folder)
    assert choose_layout(built.spec, built.rebuild, open_folder(folder)).kind == HUGGING_FACE


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_peft_adapter_names_transformers_own_modules_and_no_towers(
    family: str, write_folder: Write
) -> None:
    """They are those of transformers' classes, whatever spelling the folder has; and they are read back."""
    folder = published(family, write_folder)
    built = target(
        folder, type="lora", rank=2, targets=("q_proj", "lm_head") if family == "qwen3_vl" else ("q_proj",)
    )
    names = huggingface_names(built.base, open_folder(folder), built.spec.adapted)
    assert no_peft_form(built.spec, huggingface=names) is None
    assert built.adapters is not None
    weights = {t.name: mx.random.normal(t.shape) for u in built.spec.units for t in u.tensors if t.trainable}
    modules = {f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(len(built.spec.units) - 1)}
    modules |= {"lm_head"} if family == "qwen3_vl" else set()
    config = peft_config(built.adapters, weights, built.spec, "base")
    tensors = peft_weights(weights, built.spec)
    assert set(config["target_modules"]) == modules
    assert {n.removeprefix("base_model.model.").partition(".lora_")[0] for n in tensors} == modules
    older = {n.replace("model.language_model.", "language_model.model."): a for n, a in tensors.items()}
    for spelled in (tensors, older):
        _, found = from_peft(config, spelled, built.base, "here")
        assert found.keys() == weights.keys()
        assert all(mx.array_equal(found[name], array) for name, array in weights.items())
