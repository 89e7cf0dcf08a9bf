"""The model files of our own against transformers on torch, whose logits are a fixture; and what transformers cannot
say: packed documents, rows padded on the left, answers token by token, and keys that are refused.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from support.our_families import CASES, FIXTURE, TOKENS, config_of, kept, weight

from mlx_empire.errors import UserError
from mlx_empire.model.build import build_model
from mlx_empire.model.config import complete
from mlx_empire.model.families.alibi import alibi_mask, alibi_slopes
from mlx_empire.model.layers import combine, same_document
from mlx_empire.model.mlx_lm_modules import OURS

EXPECTED = json.loads(FIXTURE.read_text(encoding="utf-8"))
SPEAKING = ("olmo clipped", "falcon-40b", "falcon-rw")


def model_of(name: str, **changes: Any) -> nn.Module:
    model = build_model(complete({**config_of(name), **changes}, name), name)
    model.load_weights([(k, mx.array(weight(k, v.shape))) for k, v in tree_flatten(model.parameters())])
    return model.eval()


def logits_of(model: nn.Module) -> np.ndarray:
    return np.array(model(mx.array(TOKENS)))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str) -> None:
    expected = np.array(EXPECTED[name])
    assert np.abs(expected).max() > 1
    assert np.abs(kept(logits_of(model_of(name))) - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("olmo clipped", "clip_qkv", None),
        ("olmo stretched", "rope_parameters", None),
        ("falcon one after the other", "rope_theta", 1e4),
        ("falcon-rw", "alibi", False),
        ("falcon multi-head", "activation", "gelu"),
    ],
)
def test_a_key_that_is_read_shows_in_the_logits(name: str, key: str, value: Any) -> None:
    other = kept(logits_of(model_of(name, **{key: value})))
    assert np.abs(other - np.array(EXPECTED[name])).max() > 1e-2


@pytest.mark.parametrize("name", SPEAKING)
def test_an_answer_token_by_token_has_the_logits_of_the_row(name: str) -> None:
    model, row = model_of(name), mx.array(TOKENS[:1])[:, :40]
    cache = make_prompt_cache(model)
    parts = [model(row[:, :30], cache=cache), *(model(row[:, i : i + 1], cache=cache) for i in range(30, 40))]
    assert np.abs(np.array(mx.concatenate(parts, axis=1)) - np.array(model(row))).max() < 1e-4


@pytest.mark.parametrize("start", [1, 200])
def test_a_packed_document_has_the_positions_that_it_has_alone(start: int) -> None:
    """In float32 exactly: also behind position 256, where bfloat16 would round those of the row."""
    width, slopes = 300, alibi_slopes(6)
    documents = mx.array([[0] * start + [1] * (width - start)])
    whole = alibi_mask(slopes, combine("causal", same_document(documents)), width, width, 0.25, mx.float32)
    alone = alibi_mask(slopes, "causal", width - start, width - start, 0.25, mx.float32)
    assert whole.shape == (1, 6, width, width)
    assert mx.array_equal(whole[0, :, start:, start:], alone)
    assert mx.all(whole[:, :, start:, :start] == -mx.inf)


def test_slopes_are_the_papers() -> None:
    """arXiv:2108.12409: of 8 heads 1/2, 1/4, ..., 1/256; what is no power of two takes from the next."""
    assert alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))
    assert alibi_slopes(12) == (*alibi_slopes(8), *alibi_slopes(16)[0:8:2])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn: false"),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn: 2"),
        ({"new_decoder_architecture": True, "num_kv_heads": 3}, "num_kv_heads"),
        ({"num_attention_heads": 5}, "must divide hidden_size"),
        ({"activation": "mish"}, "activation: mish"),
        (
            {"rope_parameters": {"rope_type": "nobody", "rope_theta": 1e4}},
            "mlx_empire's falcon would leave it out",
        ),
    ],
)
def test_what_has_no_forward_pass_is_refused_in_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        build_model(complete({**config_of("falcon-7b"), **changes}, "some/folder"), "some/folder")
    assert "\n" not in str(error.value)


def test_ai2s_own_layout_of_olmo_is_refused_with_the_remedy() -> None:
    config = {"model_type": "olmo", "d_model": 64, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 128}
    with pytest.raises(UserError, match=r"d_model: .* hf_olmo; fetch the model as transformers has it"):
        build_model(config, "some/folder")


def test_mlx_lm_has_none_of_them_or_one_that_ends_the_program() -> None:
    """Where mlx-lm gets one, ours is to be held against it."""
    (folder,) = mlx_lm.models.__path__
    there = {name for name in OURS if (Path(folder) / f"{name}.py").exists()}
    assert there == {"olmo"}
    assert importlib.util.find_spec("hf_olmo") is None
    assert "sys.exit" in (Path(folder) / "olmo.py").read_text(encoding="utf-8")


def test_mlx_lm_finds_ours_among_its_own() -> None:
    for name in OURS:
        found = mlx_lm.utils._get_classes({"model_type": name})
        assert {one.__module__ for one in found} == {f"mlx_empire.model.families.{name}"}
