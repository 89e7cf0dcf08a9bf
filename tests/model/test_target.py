"""Where the description of what is trained comes from, and what is said of a model that cannot be trained here."""

import json

import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from support.tiny_models import tiny_config

from mlx_empire.errors import UserError
from mlx_empire.model import catalog
from mlx_empire.model.build import build_model
from mlx_empire.model.target import catalog_target, planned_target
from mlx_empire.recipe.load import parse_recipe

TEXT = """
model: {path: PATH}
data: {path: d, sequence_length: 2048}
batch: {global_size: 4}
optimizer: {learning_rate: 1e-5}
run: {dir: r, steps: 10}
"""


def recipe(path="llama-3.2-1b", *overrides):
    return parse_recipe(TEXT.replace("PATH", str(path)), "x.yaml", overrides)


def test_a_folder_wins_over_the_catalog(tmp_path):
    """A tuned model has rows of its own, so parameters may differ; a kind of model may not."""
    ours = catalog.load("llama-3.2-1b")[0] | {"vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(ours))
    found = planned_target(recipe(tmp_path, "model.architecture=llama-3.2-1b"))
    assert found.base_parameters == found.active_parameters == 1_235_814_400 - (128_256 - 1000) * 2048
    assert found.not_trainable is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "llama-3.1-8b",
            "is llama of width 4096 with 32 layers, and .* is llama of width 64 with 4 layers; leave",
        ),
        ("lama-3.1-8b", "not in the catalog; did you mean llama-3.1-8b?"),
    ],
)
def test_a_folder_of_another_kind_than_its_recipe_says_is_refused(tmp_path, name, said):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama")))
    with pytest.raises(UserError, match=rf"^model\.architecture: {name}: {said}"):
        planned_target(recipe(tmp_path, f"model.architecture={name}"))


def test_a_catalog_name_stands_in_for_a_folder_that_is_not_there():
    assert planned_target(recipe()).base_parameters == 1_235_814_400
    elsewhere = planned_target(recipe("models/x", "model.architecture=llama-4-scout-109b"))
    assert elsewhere.base_parameters == 107_769_861_120
    assert elsewhere.active_parameters == 17_172_894_720


def test_a_catalog_name_in_the_path_wins_over_the_stand_in():
    asked = recipe("llama-3.2-1b", "model.architecture=llama-4-scout-109b")
    assert planned_target(asked).base_parameters == 1_235_814_400


def test_adapters_do_not_change_the_models_own_count():
    found = catalog_target("llama-3.1-8b", recipe("x", "tuning.type=lora", "tuning.rank=8"))
    assert found.base_parameters == 8_030_261_248
    assert found.spec.parameters > found.base_parameters
    assert found.not_trainable is None
    ternary = catalog_target("llama-3.1-8b", recipe("x", "tuning.type=qlora", "tuning.bits=ternary"))
    assert ternary.not_trainable is None
    assert ternary.spec.parameters - ternary.spec.trainable_parameters == 8_030_261_248
    diet = catalog_target("llama-3.1-8b", recipe("x", "optimizer.master_weights=diet"))
    assert diet.not_trainable is None


def test_a_quantised_folder_serves_adapters_and_no_full_fine_tuning(tmp_path):
    config = {
        **tiny_config("llama", hidden_size=64, intermediate_size=128),
        "quantization": {"bits": 4, "group_size": 64},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantised"):
        planned_target(recipe(tmp_path))
    found = planned_target(recipe(tmp_path, "tuning.type=lora"))
    assert any(t.dtype == "uint32" for u in found.spec.units for t in u.tensors)


@pytest.mark.parametrize(
    ("path", "message"),
    [("llama-3.2-1bb", "such as llama-3.2-1b"), ("nowhere/at-all", "neither a folder nor a catalog name")],
)
def test_an_unknown_model_is_refused_in_one_line(path, message):
    with pytest.raises(UserError, match=message) as error:
        planned_target(recipe(path))
    assert "\n" not in str(error.value)


def test_a_folder_stored_in_several_formats_is_counted_as_mlx_lm_packs_it(tmp_path):
    config = tiny_config("llama", hidden_size=128, intermediate_size=256)
    own = {"bits": 8, "group_size": 32}
    packed = {
        "bits": 4,
        "group_size": 64,
        "model.layers.1.mlp.down_proj": own,
        "lm_head": False,
    }
    model = build_model(config, "llama")
    nn.quantize(model, 64, 4, class_predicate=lambda path, module: _settings(packed, path, module))
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization": packed}))
    found = planned_target(recipe(tmp_path, "tuning.type=lora", "model.dtype=float32"))
    frozen = [t for u in found.spec.units for t in u.tensors if not t.trainable]
    ours = {t.name.replace(".linear.", "."): (t.shape, t.dtype) for t in frozen}
    theirs = {name: (a.shape, str(a.dtype).split(".")[-1]) for name, a in tree_flatten(model.parameters())}
    assert ours == theirs


def _settings(packed, path, module):
    if not hasattr(module, "to_quantized"):
        return False
    return packed.get(path, True)
