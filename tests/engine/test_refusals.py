"""Models that cannot be streamed are refused with their name; packing is refused where documents would mix."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from support import published
from support.every_model import small_config
from support.stepping import Case, trainer_of
from support.tiny_models import FAMILIES, OTHER_FAMILIES, tiny_config

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.layer_calls import Running
from mlx_empire.engine.passes import Passes
from mlx_empire.engine.store import ShardStore
from mlx_empire.engine.streamable import check_packing, probe_root, verify_scaled_down
from mlx_empire.errors import UserError
from mlx_empire.model import catalog
from mlx_empire.model.build import describe, foreign
from mlx_empire.model.layers import SlottedModel
from mlx_empire.model.scaled_down import scaled_down_config
from mlx_empire.plan.shards import make_plan

SIZE, VOCABULARY = 16, 32


class Layer(nn.Module):
    """A layer that takes whatever else the model hands it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)

    def __call__(self, x: mx.array, extra: Any = None) -> Any:
        return x + self.linear(x)


class Pair(Layer):
    """A layer that returns two things."""

    def __call__(self, x: mx.array, extra: Any = None) -> Any:
        out = super().__call__(x)
        return out, out * 2


class PairModel(nn.Module):
    """A decoder whose layers return two things; `kind` says what becomes of the second."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed_tokens = nn.Embedding(VOCABULARY, SIZE)
        self.layers = [Pair() for _ in range(3)]
        self.lm_head = nn.Linear(SIZE, VOCABULARY, bias=False)

    def __call__(self, tokens: mx.array) -> Any:
        h, second = self.embed_tokens(tokens), None
        for layer in self.layers:
            h, second = layer(h, second if self.kind == "handed on" else None)
        return self.lm_head(h + second if self.kind == "used by the head" else h)


class Model(nn.Module):
    """A decoder whose way of calling its layers is chosen by `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed_tokens = nn.Embedding(VOCABULARY, SIZE)
        self.layers = [Layer() for _ in range(3)]
        self.lm_head = nn.Linear(SIZE, VOCABULARY, bias=False)

    def __call__(self, tokens: mx.array) -> Any:
        h = self.embed_tokens(tokens)
        first = h
        for i, layer in enumerate(self.layers):
            if self.kind == "shares hidden states":
                first, h = (h if i == 0 else first), layer(h, first if i else None)
            elif self.kind == "gives layers the tokens":
                h = layer(h, self.embed_tokens(tokens))
            elif self.kind == "calls by keyword":
                h = layer(x=h, extra=None)
            elif self.kind == "calls by another keyword":
                h = layer(extra=h)
            elif self.kind == "tells layers by their class":
                h = layer(h) if isinstance(layer, Layer) else h * 2
            elif self.kind == "visits a layer twice":
                h = layer(layer(h))
            elif self.kind != "skips a layer" or i != 1:
                h = layer(h)
        if self.kind == "shares hidden states":
            h = self.layers[0](h, h)
        return self.lm_head(h)


def probe(model: nn.Module) -> Any:
    """What the trainer asks of a model before training."""
    spec = describe(model, {"model_type": "invented", "vocab_size": VOCABULARY}, "invented", "float32")
    weights = dict(nn.utils.tree_flatten(model.parameters()))
    with CommThread() as thread:
        store = ShardStore(make_plan(spec.units, [1.0], 3), model, SoloCommunicator("here"), thread)
        for index, unit in enumerate(spec.units):
            store.load(index, ((t, weights[t.name]) for t in unit.tensors))
        with foreign("invented: it cannot be run", mixed=True):
            return probe_root(SlottedModel(model, "invented"), store, VOCABULARY)


@pytest.mark.parametrize(
    "kind",
    [
        "shares hidden states",
        "gives layers the tokens",
        "visits a layer twice",
        "skips a layer",
        "calls by another keyword",
    ],
)
def test_layers_tied_by_more_than_the_hidden_state_are_refused(kind):
    with pytest.raises(UserError, match="invented") as error:
        probe(Model(kind))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["handed on", "used by the head"])
def test_what_layers_return_besides_the_hidden_state_may_not_be_used(kind):
    with pytest.raises(UserError, match="invented") as error:
        probe(PairModel(kind))
    assert "\n" not in str(error.value)


def test_what_layers_return_besides_and_nothing_uses_is_no_hindrance():
    assert probe(PairModel("dropped")).head == (1,)


@pytest.mark.parametrize("kind", ["plain", "calls by keyword", "tells layers by their class"])
def test_a_plain_model_is_taken_and_its_root_understood(kind):
    use = probe(Model(kind))
    assert (use.embed, use.head, use.absolute_positions) == ((0,), (1,), False)


@pytest.mark.parametrize("family", ["gpt2", "mamba2"])
def test_packing_is_refused_without_relative_positions_or_masks(family):
    with CommThread() as thread, pytest.raises(UserError, match=r"set data\.packing: false"):
        trainer_of(Case(family, packed=True), SoloCommunicator("here"), thread)


@pytest.mark.parametrize("family", [f for f in (*FAMILIES, *OTHER_FAMILIES) if f not in ("gpt2", "mamba2")])
def test_packing_is_allowed_elsewhere(family):
    with CommThread() as thread:
        trainer = trainer_of(Case(family), SoloCommunicator("here"), thread)
        check_packing(trainer._slotted, probe_root(trainer._slotted, trainer.store, 256))


@pytest.mark.parametrize("by_pattern", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_the_twin_of_every_family_is_streamed_exactly_also_with_all_kept(family, by_pattern):
    verify_scaled_down(tiny_config(family), family, by_pattern=by_pattern, keeps=by_pattern)


@pytest.mark.parametrize("name", ["llama-4-scout-109b", "deepseek-v3-671b", "gemma-2-27b", "mixtral-8x22b"])
def test_a_published_model_scaled_down_is_small_and_streamed_exactly(name):
    config, _ = catalog.load(name)
    mx.reset_peak_memory()
    verify_scaled_down(config, name)
    assert mx.get_peak_memory() < 1 << 28


# One of each kind of relation between numbers: heads in a nested part, sizes that are rounded, a rotary dimension, an
# odd rotary part, factors by dimension, lists of heads, chosen experts under another name, a pattern of full attention
# alone, sections of a rotary dimension, linear attention of other heads, no heads at all, sizes left to defaults.
PUBLISHED = (
    *("dbrx", "lfm2-1.2b", "minimax-m2", "mimo-v2-flash", "minicpm3-4b", "openelm-270m", "ernie-4.5-21b-a3b"),
    *("exaone-4.0-1.2b", "qwen2.5-vl-3b", "kimi-linear-48b", "mamba-130m-hf", "gemma-3-4b-it"),
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_can_be_scaled_down(name):
    verify_scaled_down(published.config_of(name), name)


def test_the_twin_is_small_where_the_defaults_of_mlx_lm_give_the_sizes():
    small = scaled_down_config({"model_type": "cohere"})
    assert (small["hidden_size"], small["num_hidden_layers"], small["vocab_size"]) == (64, 12, 256)


def test_the_twin_keeps_the_pattern_of_layers():
    config, _ = catalog.load("llama-4-maverick-400b")
    small = scaled_down_config(config)["text_config"]
    assert small["interleave_moe_layer_step"] == config["text_config"]["interleave_moe_layer_step"]
    assert small["num_hidden_layers"] == 12


def test_a_wrong_step_is_found_by_the_twin(monkeypatch):
    right = Passes.backward

    def wrong(self: Any, index: int, r: Running, *rest: Any, **more: Any) -> Any:
        gradients = right(self, index, r, *rest, **more)
        r.hidden = r.hidden * 1.01  # a cotangent that is one per cent off
        return gradients

    monkeypatch.setattr(Passes, "backward", wrong)
    with pytest.raises(UserError, match="would be trained wrongly"):
        verify_scaled_down(tiny_config("llama"), "llama")


def test_what_mlx_cannot_run_here_is_refused_by_name():
    with pytest.raises(UserError, match="muse_spark"):
        verify_scaled_down(small_config("muse_spark"), "muse_spark")
