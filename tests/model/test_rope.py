"""RoPE in two spellings: transformers 5's `rope_parameters` and the keys that mlx-lm reads build the same model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from support.every_module import UNBUILT, names, reader, small_config

from mlx_empire.engine.streamable import verify_scaled_down
from mlx_empire.errors import UserError
from mlx_empire.model import catalog
from mlx_empire.model.build import build_model
from mlx_empire.model.config import complete, reader_of
from mlx_empire.model.rope import LOCAL_THETA_NAMES, PARTIAL_NAMES, SCALINGS, SHARED, THETA_NAMES
from mlx_empire.model.scaled_down import scaled_down_config

TOKENS = mx.arange(1, 33)[None]
MODULES = [n for n in names() if any(key in reader(n) for key in THETA_NAMES) and n not in UNBUILT]
# Every day one of each way in which a module says it; the others in `make test-slow`.
DAILY = {
    "llama",
    "qwen2",
    "mixtral",
    "phi3",
    "smollm3",
    "seed_oss",
    "gemma3_text",
    "gpt_neox",
    "stablelm",
    "llama4",
    "olmo3",
}
# What needs keys of its own to be built at all is left to the families' own code.
SCALED = [
    n
    for n in MODULES
    if "rope_scaling" in reader(n)
    and not n.startswith(("hunyuan", "minicpm3", "phimoe", "falcon_h1", "deepseek_v41"))
]
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 4.0}


def old_spelling(name: str, theta: float, scaling: dict[str, Any] | None = None) -> dict[str, Any]:
    config = small_config(name)
    text = config.get("text_config", config)
    text[next(key for key in THETA_NAMES if key in reader(name))] = theta
    for key in LOCAL_THETA_NAMES:
        if key in reader(name):
            text[key] = theta
    for key in PARTIAL_NAMES:
        if key in reader(name):
            text[key] = 0.5
    if scaling is not None:
        text["rope_scaling"] = {"type": scaling["rope_type"], **scaling}
    return config


def new_spelling(name: str, theta: float, scaling: dict[str, Any] | None = None) -> dict[str, Any]:
    """As transformers 5 saves what `old_spelling` gives."""
    config = old_spelling(name, theta, scaling)
    text = config.get("text_config", config)
    kept = text.pop("rope_scaling", None) or {}
    flat = {"rope_type": kept.pop("type", "default"), **kept, "rope_theta": theta}
    for key in (*THETA_NAMES, *LOCAL_THETA_NAMES):
        text.pop(key, None)
    for key in PARTIAL_NAMES:
        if key in text:
            flat["partial_rotary_factor"] = text.pop(key)
    local = any(key in reader(name) for key in LOCAL_THETA_NAMES)
    plain = {k: v for k, v in flat.items() if k in ("rope_theta", "partial_rotary_factor")}
    layers = {"full_attention": flat, "sliding_attention": {"rope_type": "default", **plain}}
    text["rope_parameters"] = layers if local else flat
    return config


@pytest.fixture(scope="module", autouse=True)
def uncompiled() -> Iterator[None]:
    """On a CPU `mx.compile` calls a compiler for every function: most of the time, and no other numbers."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def logits(config: dict[str, Any]) -> mx.array:
    """Of a model of random weights, none of them zero."""
    model = build_model(complete(config, "folder"), "folder")
    mx.random.seed(3)
    model.update(tree_map(lambda a: 0.3 * mx.random.normal(a.shape), model.parameters()))
    found: mx.array = model(TOKENS)
    mx.eval(found)
    return found


@pytest.mark.parametrize(
    "name", [n if n in DAILY else pytest.param(n, marks=pytest.mark.slow) for n in MODULES]
)
def test_both_spellings_build_the_same_model(name: str) -> None:
    used = (
        {"position_embedding_type": "rope"} if name == "granitemoehybrid" else {}
    )  # which has none by default
    old, new, other = (
        logits({**make(name, theta), **used})
        for make, theta in ((old_spelling, 5e5), (new_spelling, 5e5), (new_spelling, 100.0))
    )
    assert mx.array_equal(old, new)
    assert mx.abs(old - other).max().item() > 1e-6 * mx.abs(old).max().item()


@pytest.mark.slow
@pytest.mark.parametrize("scaling", [LINEAR, YARN], ids=lambda s: s["rope_type"])
@pytest.mark.parametrize("name", SCALED)
def test_a_scaling_is_applied_or_refused(name: str, scaling: dict[str, Any]) -> None:
    """The same logits in both spellings and others than without it; a module that would ignore it is refused."""
    known = reader_of(complete(new_spelling(name, 5e5), "folder"))
    assert known is not None
    config = new_spelling(name, 5e5, scaling)
    if scaling["rope_type"] not in SCALINGS.get(known[0], SHARED):
        with pytest.raises(UserError, match=f"rope_type: {scaling['rope_type']}: mlx-lm's "):
            complete(config, "folder")
        return
    found = logits(config)
    assert mx.array_equal(found, logits(old_spelling(name, 5e5, scaling)))
    if name != "deepseek_v2":  # cannot be built without one
        plain = logits(new_spelling(name, 5e5))
        assert mx.abs(found - plain).max().item() > 1e-6 * mx.abs(plain).max().item()


THETA = {"rope_theta": 5e5, "rope_type": "default"}
REFUSED = {
    "unknown type": ("llama", {"rope_parameters": {**THETA, "rope_type": "spiral"}}, "rope_type: spiral"),
    "unknown key": ("llama", {"rope_parameters": {**THETA, "twist": 3}}, r"rope_parameters\.twist: 3"),
    "no mapping": ("llama", {"rope_parameters": 7}, "rope_parameters: 7: needs a mapping"),
    "no number": ("llama", {"rope_parameters": {"rope_theta": "big"}}, "rope_theta: big: needs a positive"),
    "two thetas": ("llama", {"rope_theta": 1e4, "rope_parameters": THETA}, r"rope_parameters\.rope_theta.*keep"),
    "two types": ("llama", {"rope_parameters": {**THETA, "type": "linear"}}, "rope type: default and linear"),
    "two scalings": (
        "llama",
        {"rope_scaling": LINEAR, "rope_parameters": {**THETA, **LINEAR, "factor": 2.0}},
        r"rope_parameters\.factor: 2\.0: the older spelling says 4\.0",
    ),
    "two layer types": (
        "llama",
        {"rope_parameters": {"full_attention": THETA, "sliding_attention": {**THETA, "rope_theta": 1e4}}},
        r"rope_parameters\.sliding_attention",
    ),
    "flat beside layers": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": THETA, "factor": 2.0}},
        r"rope_parameters\.factor: 2\.0: stands beside",
    ),
    "scaled local layers": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": THETA, "sliding_attention": {**THETA, **LINEAR}}},
        r"sliding_attention\.rope_type: linear",
    ),
    "another local theta": (
        "gemma3_text",
        {"rope_local_base_freq": 1e4, "rope_parameters": {"full_attention": LINEAR, "sliding_attention": THETA}},
        "rope_local_base_freq says 10000",
    ),
    "part of a head": ("qwen2", {"rope_parameters": {**THETA, "partial_rotary_factor": 0.5}}, "factor: 0.5"),
    "scaling ignored": ("qwen3_moe", {"rope_scaling": YARN}, "rope_type: yarn: mlx-lm's qwen3_moe"),
    "scaling unread": ("gemma", {"rope_scaling": LINEAR}, "rope_type: linear: mlx-lm's gemma"),
    "attention factor": ("llama", {"rope_parameters": {**THETA, **YARN, "attention_factor": 2.0}}, "factor on queries"),
    "untruncated": ("llama", {"rope_parameters": {**THETA, **YARN, "truncate": False}}, r"rope_parameters\.truncate"),
    "half of a glm": ("glm", {"rope_theta": 1e4}, "partial_rotary_factor: 0.5: mlx-lm's glm would leave it out"),
    "fixed theta": ("recurrent_gemma", {"rope_theta": 5e5}, "rope_theta: 500000.0: mlx-lm's recurrent_gemma"),
    "unmeasurable": ("llama", {"rope_parameters": {**THETA, **YARN, "factor": "four"}}, "its RoPE cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_mlx_lm_cannot_do_is_refused_by_name(case: str) -> None:
    family, changes, said = REFUSED[case]
    config = small_config(family)
    for key in ("rope_theta", *LOCAL_THETA_NAMES):
        config.pop(key, None)
    with pytest.raises(UserError, match=said) as error:
        complete({**config, **changes}, "some/folder/config.json")
    assert str(error.value).startswith("some/folder/config.json: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", names())
def test_completing_twice_is_completing_once(name: str) -> None:
    if name in ("glm", "recurrent_gemma"):
        pytest.skip("refused")
    once = complete(small_config(name), "folder")
    assert complete(once, "folder") == once


@pytest.mark.parametrize("name", catalog.names())
def test_published_configurations_keep_every_value(name: str) -> None:
    """Keys are added, and no value that stands there becomes another one."""
    published = json.loads((files("mlx_empire.model") / "architectures" / f"{name}.json").read_text("utf-8"))
    published.pop("_facts")
    found, _ = catalog.load(name)
    for here, there in ((published, found), (published.get("text_config", {}), found.get("text_config", {}))):
        for key in here.keys() - {"rope_scaling", "text_config"}:
            assert there[key] == here[key]
        scaling = here.get("rope_scaling") or {}
        assert scaling.items() <= (there.get("rope_scaling") or {}).items()


def test_layer_types_become_a_pattern() -> None:
    config = {**small_config("cohere2"), "layer_types": ["sliding_attention", "full_attention"] * 2}
    assert complete(config, "folder")["sliding_window_pattern"] == 2
    letters = complete({**config, "model_type": "exaone4", "sliding_window_pattern": 2}, "folder")
    assert letters["sliding_window_pattern"] == "LG"
    with pytest.raises(UserError, match="repeats one pattern"):
        complete(
            {**config, "layer_types": ["full_attention", "full_attention", "sliding_attention"]}, "folder"
        )
    with pytest.raises(UserError, match="layer_types says 2"):
        complete({**config, "sliding_window_pattern": 4}, "folder")


@pytest.mark.parametrize("layers", [False, True])
def test_the_scaled_down_model_keeps_a_scaling_with_one_factor_for_each_dimension(layers: bool) -> None:
    """It has fewer dimensions, so one factor stands for all; also within the types of layers."""
    long = {**THETA, "rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [3.0] * 48}
    long["original_max_position_embeddings"] = 64
    published = {**small_config("phi3"), "head_dim": 96, "rope_theta": 5e5, "rope_parameters": long}
    if layers:
        small = scaled_down_config({**published, "rope_parameters": {"full_attention": long}})[
            "rope_parameters"
        ]
        assert small == {"full_attention": {**long, "short_factor": 1.0, "long_factor": 3.0}}
        return
    small = scaled_down_config(complete(published, "phi3"))
    assert small["rope_scaling"]["rope_type"] == "longrope"
    assert small["rope_scaling"]["long_factor"] == 3.0
    verify_scaled_down(complete(published, "phi3"), "phi3")
