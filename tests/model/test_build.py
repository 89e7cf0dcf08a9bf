"""Models as numbers, against what mlx-lm builds and what was published."""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from support.tiny_models import FAMILIES, OTHER_FAMILIES, tiny_config

from mlx_empire.errors import UserError
from mlx_empire.model.build import build_model, compute_dtype, describe
from mlx_empire.model.config import read_config

DEEP = (
    '{"model_type": "llama", "a": ' + "[" * 900 + "]" * 900 + "}"
)  # JSON reads it, a copy of it is too deep

# Published configurations by hand, with the exact parameter count of the published checkpoint.
LLAMA_3_2_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_units_hold_every_parameter_once(family):
    config = tiny_config(family)
    model = build_model(config, family)
    spec = describe(model, config, family, "float32")
    found = {t.name: t.shape for u in spec.units for t in u.tensors}
    expected = {name: tuple(a.shape) for name, a in tree_flatten(model.parameters())}
    assert found == expected
    assert len(spec.units) == 1 + len(model.layers)
    assert all(str(i) in t.name for i, u in enumerate(spec.units[1:]) for t in u.tensors)


def test_published_count_without_computing_a_weight():
    before = mx.get_active_memory()
    spec = describe(build_model(LLAMA_3_2_1B, "llama"), LLAMA_3_2_1B, "llama", "bfloat16")
    assert spec.parameters == 1_235_814_400
    assert mx.get_active_memory() - before < 1 << 20


@pytest.mark.parametrize("family", ["phixtral", "dbrx", "openelm"])
def test_sizes_under_other_names_are_read_off_the_embedding(family):
    config = tiny_config(family)
    assert not {"vocab_size", "hidden_size"} <= config.keys()
    spec = describe(build_model(config, family), config, family, "float32")
    assert (spec.text_config["vocab_size"], spec.text_config["hidden_size"]) == (256, 64)


def test_a_vocabulary_that_the_nested_configuration_lacks_is_read_off_the_embedding():
    config = tiny_config("gemma4")
    del config["vocab_size"], config["text_config"]["vocab_size"]
    model = build_model(json.loads(json.dumps(config)), "gemma4")
    assert (
        describe(model, config, "gemma4", "float32").text_config["vocab_size"] == 262144
    )  # mlx-lm's default


@pytest.mark.parametrize(
    ("config", "wanted", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, None, "bfloat16"),
        ({"dtype": "float32"}, None, "float32"),
        ({"torch_dtype": "float16"}, None, "float32"),
        ({}, None, "float32"),
        ({"text_config": {"torch_dtype": "bfloat16"}}, None, "bfloat16"),
        ({"torch_dtype": "bfloat16"}, "float32", "float32"),
    ],
)
def test_compute_dtype(config, wanted, dtype):
    assert compute_dtype(config, wanted) == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "no_such_model"}, "cannot build model_type 'no_such_model'"),
        ({"hidden_size": "wide"}, "cannot build"),
        ({"model_type": "qwen3_moe", "head_dim": None}, "config.json lacks 'num_experts'"),
        ({"model_file": "evil.py"}, "code is never run"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "quantised"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(change, message):
    with pytest.raises(UserError, match=message) as error:
        build_model({**tiny_config("llama"), **change}, "some/folder")
    assert "\n" not in str(error.value)
    assert "some/folder" in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model_type": 3}', "[" * 100_000, DEEP, "\x00"])
def test_damaged_configurations_are_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="local Hugging Face folder"):
        read_config(tmp_path / "absent")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama")))
    assert read_config(tmp_path)["model_type"] == "llama"
