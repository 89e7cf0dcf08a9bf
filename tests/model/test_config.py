"""What a configuration leaves open: transformers' defaults (held against transformers) and what the folder shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from support.every_module import names, small_config
from support.tiny_models import tiny_config
from transformers import CONFIG_MAPPING

from mlx_empire.errors import UserError
from mlx_empire.formats.export_folder import FolderWriter
from mlx_empire.formats.hf_folder import open_folder
from mlx_empire.formats.source import FolderSource
from mlx_empire.formats.staging import stored_config
from mlx_empire.model.build import build_model, describe, refuse_dropped_head
from mlx_empire.model.config import TIE, complete, read_config
from mlx_empire.model.family_defaults import ROPE, TIED, UNTIED
from mlx_empire.model.mlx_lm_modules import REMAPPED

FAMILIES = sorted(TIED | UNTIED | ROPE.keys())
ROPES = [name for name in FAMILIES if name in ROPE and name not in ("glm", "olmo")]


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_transformers(name: str) -> None:
    there = CONFIG_MAPPING[name]().to_dict()
    assert {True: name in TIED, False: name in UNTIED, None: name not in TIED | UNTIED}[there.get(TIE)]
    rope = there.get("rope_parameters") or {}
    layered = any(isinstance(value, dict) for value in rope.values())
    expected = dict(rope) if layered or rope.get("rope_type") != "default" else {**rope, "rope_type": None}
    found = {**ROPE.get(name, {}), **({"type": rope["type"]} if "type" in rope else {})}
    assert found == {k: v for k, v in expected.items() if v is not None}


def test_every_family_of_mlx_lm_that_transformers_has_stands_in_the_defaults() -> None:
    known = set(CONFIG_MAPPING.keys())
    wanted = {*names(), *REMAPPED} & known - {"pixtral"}  # there a name of the vision tower alone
    for kind in sorted(wanted):
        text = getattr(CONFIG_MAPPING[kind](), "text_config", None)
        wanted |= {text.model_type} & known if text is not None else set()
    silent_ = {n for n in wanted if n not in TIED | UNTIED | ROPE.keys()}
    assert all(TIE not in CONFIG_MAPPING[n]().to_dict() for n in silent_)
    assert wanted - silent_ <= set(FAMILIES) <= known


def layered(name: str) -> bool:
    return any(isinstance(value, dict) for value in ROPE[name].values())


@pytest.mark.parametrize("name", ROPES)
def test_the_exported_configuration_means_the_same_to_transformers(name: str, tmp_path: Path) -> None:
    """What transformers saves, completed and exported, gives transformers the same RoPE and tie again."""
    own = json.loads(json.dumps(ROPE[name]))
    for flat in own.values() if layered(name) else [own]:
        flat.setdefault("rope_type", "default")
        if name not in ("recurrent_gemma", "bailing_hybrid"):  # one built in, one written twice
            flat["rope_theta"] = 123_456.0
    config = CONFIG_MAPPING[name](rope_parameters=own)
    saved = json.loads(config.to_json_string())
    for key in [TIE] * (TIE in saved and not layered(name)):
        del saved[key]
    exported = stored_config(complete(saved, name), "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(exported))
    again = CONFIG_MAPPING[name].from_pretrained(tmp_path)

    def said(rope: dict[str, Any]) -> dict[str, Any]:
        whole = ("partial_rotary_factor", 1.0)  # may be left out
        if (rope.get("rope_type"), rope.get("factor")) == ("yarn", 1.0):  # changes nothing
            rope = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        return {
            k: said(v) if isinstance(v, dict) else v
            for k, v in rope.items()
            if k != "type" and (k, v) != whole
        }

    assert said(again.rope_parameters) == said(config.rope_parameters)
    assert getattr(again, TIE, None) == getattr(config, TIE, None)


def write_folder(
    path: Path, config: dict[str, Any], head: bool | None = None, built_as: bool = False
) -> dict[str, Any]:
    """A folder of random weights; `built_as`: whether they are those of a tied model. `head`: drop or add one."""
    model = build_model({**config, TIE: built_as}, "made")
    mx.random.seed(1)
    weights = {k: 0.3 * mx.random.normal(a.shape) for k, a in tree_flatten(model.parameters())}
    if head is False:
        del weights["lm_head.weight"]
    if head is True:
        weights["lm_head.weight"] = 0.3 * mx.random.normal((256, 64))
    path.mkdir()
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return weights


def silent(family: str, **changes: Any) -> dict[str, Any]:
    """Without a word about tied embeddings."""
    return {k: v for k, v in tiny_config(family, **changes).items() if k != TIE}


@pytest.mark.parametrize(
    ("family", "said", "head", "tied"),
    [
        ("llama", None, True, False),
        ("llama", None, False, True),
        ("llama", None, None, False),  # no weights: transformers' default
        ("gemma", None, None, True),
        ("gemma", None, True, True),  # a family that mlx-lm always ties
        ("starcoder2", None, None, True),
        ("starcoder2", None, True, False),
        ("llama", True, True, True),
        ("llama", False, True, False),
        ("mamba2", None, None, False),
    ],
)
def test_whether_embeddings_are_tied(
    family: str, said: bool | None, head: bool | None, tied: bool, tmp_path: Path
) -> None:
    config = silent(family) | ({} if said is None else {TIE: said})
    folder = tmp_path / "folder"
    if head is None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    else:
        write_folder(folder, config, head=head if family == "gemma" or not head else None)
    assert read_config(folder)[TIE] is tied


def test_an_index_shows_a_head_as_well(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", silent("llama"))
    (tmp_path / "f" / "model.safetensors").rename(tmp_path / "f" / "model-00001-of-00001.safetensors")
    names_ = open_folder(tmp_path / "f").tensors
    index = {"weight_map": dict.fromkeys(names_, "model-00001-of-00001.safetensors")}
    (tmp_path / "f" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_config(tmp_path / "f")[TIE] is False


@pytest.mark.parametrize(
    ("top", "text", "tied"),
    [
        (None, None, True),
        (False, None, False),
        (None, False, False),
        (True, True, True),
        (True, False, False),
    ],
)
def test_nested_configurations_are_told_on_both_levels(
    top: bool | None, text: bool | None, tied: bool
) -> None:
    """mistral3: transformers ties by default at the top, and the language model's part has another default."""
    config = small_config("mistral3")
    config["text_config"] = {k: v for k, v in config["text_config"].items() if k != TIE}
    config |= {} if top is None else {TIE: top}
    config["text_config"] |= {} if text is None else {TIE: text}
    found = complete(config, "folder")
    assert (found[TIE], found["text_config"][TIE]) == (tied, tied)
    stored = complete(config, "folder", ["language_model.lm_head.weight"])
    assert stored["text_config"][TIE] is (tied and (top, text) == (True, True))


def test_the_stored_head_is_trained_and_exported_with_its_key(tmp_path: Path) -> None:
    """From a silent folder: the head's bits are read, and mlx_lm.load of the export computes with them."""
    weights = write_folder(tmp_path / "source", silent("llama"))
    config = read_config(tmp_path / "source")
    model = build_model(config, "llama")
    spec = describe(model, config, "llama", "float32")
    source = FolderSource(tmp_path / "source", lambda: build_model(config, "llama"), spec)
    with FolderWriter(
        tmp_path / "out", spec, lambda: build_model(config, "llama"), tmp_path / "source"
    ) as writer:
        for index in range(len(spec.units)):
            writer.write_unit(index, {t.name: array for t, array in source.unit(index)})
    assert json.loads((tmp_path / "out" / "config.json").read_text())[TIE] is False
    tokens = mx.arange(16)[None]
    model.load_weights(list(weights.items()))
    assert mx.array_equal(load_model(tmp_path / "out")[0](tokens), model(tokens))
    tied = build_model({**config, TIE: True}, "llama")
    tied.load_weights([(k, a) for k, a in weights.items() if k != "lm_head.weight"])
    assert not mx.allclose(tied(tokens), model(tokens))


def test_a_head_that_mlx_lm_would_drop_is_refused(tmp_path: Path) -> None:
    config = tiny_config("gemma")  # says that it is not tied
    write_folder(tmp_path / "f", config, head=True)
    stored = open_folder(tmp_path / "f").stored()
    found = read_config(tmp_path / "f")
    spec = describe(build_model(found, "f"), found, "f", "float32")
    with pytest.raises(UserError, match=r"lm_head\.weight is stored and tie_word_embeddings is false"):
        refuse_dropped_head(spec, stored, "f")
    tied = {**found, TIE: True}
    refuse_dropped_head(describe(build_model(tied, "f"), tied, "f", "float32"), stored, "f")


@pytest.mark.parametrize("weights", ["adapters.safetensors", "adapter_model.safetensors"])
def test_an_adapter_in_the_place_of_a_model_is_told_from_an_incomplete_folder(
    weights: str, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    mx.save_safetensors(str(tmp_path / weights), {"a": mx.zeros((1,))})
    with pytest.raises(UserError, match="an adapter, and no model; name its base in model"):
        read_config(tmp_path)
