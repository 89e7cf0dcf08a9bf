"""Folders that mlx_lm.convert's own functions write: what mlx_lm.load computes from them is computed here too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import utils
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from support.tiny_models import tiny_config

from mlx_empire.formats.hf_folder import open_folder
from mlx_empire.formats.source import FolderSource, TunedSource
from mlx_empire.model.build import build_model
from mlx_empire.model.config import read_config
from mlx_empire.model.target import make_target
from mlx_empire.recipe.sections import TuningSection

TOKENS = mx.array([[1 + (31 * i * i + 7 * i) % 250 for i in range(33)]])
Predicate = Callable[[str, nn.Module], bool | dict[str, Any]]


def by_layer(path: str, module: nn.Module) -> bool | dict[str, Any]:
    """As mlx_lm's mixed recipes and dwq write them: other bits, other groups, and some left out."""
    if "down_proj" in path:
        return {"group_size": 32, "bits": 8, "mode": "affine"}
    return "layers.1." not in path


HOW: dict[str, dict[str, Any]] = {
    "4 bits": {"group_size": 32, "bits": 4},
    "8 bits": {"group_size": 32, "bits": 8},
    "mxfp4": {"mode": "mxfp4"},
    "nvfp4": {"mode": "nvfp4"},
    "mxfp8": {"mode": "mxfp8"},
    "by layer": {"group_size": 32, "bits": 4, "quant_predicate": by_layer},
}


def convert(path: Path, family: str, how: dict[str, Any] | None, *, twice: bool) -> Path:
    """A folder of random bfloat16 weights; `twice`: with mlx-lm's second copy of its settings."""
    config = tiny_config(family)
    mx.random.seed(4)
    model = build_model(config, family)
    model.apply(lambda a: (0.3 * mx.random.normal(a.shape)).astype(mx.bfloat16))
    if how is not None:
        model, config = quantize_model(
            model, config, how.get("group_size"), how.get("bits"), how.get("mode", "affine"),
            quant_predicate=how.get("quant_predicate"),
        )  # fmt: skip
        if not twice:
            del config["quantization_config"]
    save_model(path, model)
    save_config(config, path / "config.json")
    return path


def loss(model: nn.Module) -> float:
    model.apply(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a)
    logits = model.eval()(TOKENS[:, :-1])
    return float(nn.losses.cross_entropy(logits, TOKENS[:, 1:], reduction="mean"))


def our_loss(folder: Path) -> float:
    config = read_config(folder)
    target = make_target(config, TuningSection(type="lora"), "f", "float32", open_folder(folder).stored())
    source = TunedSource(FolderSource(folder, target.rebuild, target.base), target.spec, 0, target.packing)
    for index in range(len(target.spec.units)):
        target.model.load_weights([(t.name, a) for t, a in source.unit(index)], strict=False)
    return loss(target.model)


@pytest.mark.parametrize("how", [None, *HOW])
@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen3", "gemma2", "qwen2", "phi3"))],
)
def test_the_first_loss_is_that_of_mlx_lm_load(family: str, how: str | None, tmp_path: Path) -> None:
    folder = convert(tmp_path / "f", family, HOW[how] if how else None, twice=how != "8 bits")
    if how == "by layer":
        assert (
            "model.layers.0.mlp.down_proj" in json.loads((folder / "config.json").read_text())["quantization"]
        )
    assert our_loss(folder) == pytest.approx(loss(load_model(folder)[0]), rel=1e-5)


@pytest.mark.parametrize("how", [None, "4 bits"])
def test_shards_with_an_index_are_one_folder(
    how: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a model larger than one file; a layer's tensors lie in several."""

    def by_five(weights: dict[str, mx.array], max_file_size_gb: int = 5) -> list[dict[str, mx.array]]:
        items = list(weights.items())
        return [dict(items[i : i + 5]) for i in range(0, len(items), 5)]

    monkeypatch.setattr(utils, "make_shards", by_five)
    folder = convert(tmp_path / "f", "llama", HOW[how] if how else None, twice=True)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 5
    assert our_loss(folder) == pytest.approx(loss(load_model(folder)[0]), rel=1e-5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("how", [None, "4 bits"])
def test_what_mlx_lm_fuse_writes_is_read_as_by_mlx_lm_load(
    how: str | None, dora: bool, tmp_path: Path
) -> None:
    folder, out = convert(tmp_path / "f", "llama", HOW[how] if how else None, twice=True), tmp_path / "fused"
    model, config = load_model(folder)
    before = loss(load_model(folder)[0])
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 20.0, "dropout": 0.0}, use_dora=dora)
    adapters = tree_flatten(model.trainable_parameters())
    model.load_weights([(n, 0.1 * mx.random.normal(a.shape)) for n, a in adapters], strict=False)
    fused = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(fused))
    save_model(out, model)
    save_config(config, out / "config.json")
    expected = loss(load_model(out)[0])
    assert our_loss(out) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(before, rel=1e-4)
