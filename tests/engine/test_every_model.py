"""Every model of mlx-lm trains here with the whole model's loss and gradients, or is refused in one line.

The reference is mlx-lm's own model under `nn.value_and_grad`. All models take some minutes (`make test-slow`, in one
launch of two ranks); every day there is one of each kind of difficulty.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support import published
from support.every_model import models, small_config
from support.model_table import PAGE, page, refusal, refusal_of, refusal_of_folder, refusal_of_published
from support.mpi import run_ranks
from support.references import reference_gradients
from support.stepping import Case, batches_of, counted_tokens, gathered_gradients, trainer_of

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine import layer_calls
from mlx_empire.engine.streamable import verify_scaled_down
from mlx_empire.errors import UserError

# Why what cannot train here cannot: a part of the line that says so.
REFUSED = {
    "afm7": "no list of decoder layers",
    "deepseek_v41": "cannot be differentiated",
    "gemma3n": "share more than the hidden state",
    "iquestloopcoder": "only 0 of 4 layers are called",
    "muse_spark": "No Metal back-end",
    "prism_hadamard_qwen35": "mlx-lm cannot build",
    "recurrent_gemma": "mlx-lm cannot build",
    "rwkv7": "share more than the hidden state",
    "talkie": "share more than the hidden state",
}
# Families that train, set so that their layers share more than the hidden state.
SHARING: dict[str, tuple[str, dict[str, Any]]] = {
    "keys and values of other layers": ("gemma4_text", {"num_kv_shared_layers": 2}),
    "inputs by layer": ("gemma4_text", {"hidden_size_per_layer_input": 8}),
    "keys and values of the layer before": ("hunyuan", {"use_cla": True}),
    "residuals of all layers before": ("kimi_k3", {"attn_res_block_size": 2}),
}
# A layer is called by keyword; layers return more than the hidden state; masks go by a layer's class; other names.
DIFFICULT = ("gptj", "hunyuan", "gemma4", "kimi_k3", "olmo_hybrid", "phixtral", "dbrx")
EVERY_DAY = ("afm7", "gemma3n", "iquestloopcoder", "recurrent_gemma", "rwkv7", "talkie")


@cache
def verdicts() -> dict[str, str | None]:
    return {name: refusal(name) for name in models()}


@pytest.mark.parametrize("name", EVERY_DAY)
def test_what_cannot_train_is_refused_in_one_line(name, capfd):
    line = refusal(name)
    assert line is not None
    assert line.startswith(name)
    assert REFUSED[name] in line
    assert "\n" not in line
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", SHARING)
def test_layers_that_share_more_than_the_hidden_state_are_refused(kind):
    name, changes = SHARING[kind]
    line = refusal(name, **changes)
    assert line is not None
    assert "share more than the hidden state" in line


@pytest.mark.parametrize("name", DIFFICULT)
def test_a_difficult_model_has_the_whole_models_loss_and_gradients(name):
    case = Case(name, micro_batches=2, cells=1, rows=1, width=12)
    batches = batches_of(case)
    with CommThread() as thread:
        trainer = trainer_of(case, SoloCommunicator("here"), thread)
        loss = trainer.compute(batches, counted_tokens(batches))
        gradients = gathered_gradients(trainer, SoloCommunicator("here"))
    expected_loss, expected = reference_gradients(case, 1)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert norm(gradients) == pytest.approx(norm(expected), rel=1e-5)
    largest = max(np.abs(g).max() for g in expected.values())
    for path, gradient in expected.items():
        scale = max(np.abs(gradient).max(), 1e-2 * largest)  # what is smaller is rounding in good part
        assert np.abs(gradients[path] - gradient).max() <= 1e-5 * scale, path


def norm(gradients: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values())))


def test_a_fault_of_ours_is_not_blamed_on_the_model(monkeypatch):
    monkeypatch.setattr(layer_calls, "hidden_of", None)
    with pytest.raises(TypeError):
        verify_scaled_down(small_config("llama"), "llama")


def test_a_twin_that_stays_large_is_refused_before_it_is_allocated():
    with pytest.raises(UserError, match=r"config\.json may lack sizes"):
        verify_scaled_down(
            {"model_type": "gemma4"}, "gemma4"
        )  # all is left to mlx-lm's defaults, nested ones too


@pytest.mark.slow
def test_every_model_trains_or_is_refused_in_one_line():
    refused = {name: line for name, line in verdicts().items() if line is not None}
    assert {name: REFUSED.get(name, "an unknown reason") in line for name, line in refused.items()} == {
        name: True for name in REFUSED
    }
    assert all("\n" not in line for line in refused.values())


@pytest.mark.slow
def test_every_model_that_trains_does_so_with_all_kept_that_can_be():
    trained = [name for name, line in verdicts().items() if line is None]
    assert {name: refusal_of(small_config(name), name, keeps=True) for name in trained} == dict.fromkeys(
        trained
    )


@pytest.mark.slow
@pytest.mark.skipif(mx.metal.is_available(), reason="the page is of the CPU")
def test_the_page_of_models_says_what_is_so():
    large = {name: refusal_of_published(name) for name in published.names()}
    small = {name: line or refusal_of_folder(name) for name, line in verdicts().items()}
    assert PAGE.read_text(encoding="utf-8") == page(small, large)


@pytest.mark.slow
def test_every_model_that_trains_has_the_whole_models_loss_and_gradients_on_two_ranks_as_on_one():
    setting = {"micro_batches": 2, "cells": 2, "rows": 1, "shares": [2, 1], "compare": True}
    cases = {name: {**setting, "family": name} for name, line in verdicts().items() if line is None}
    first, second = run_ranks(2, "tests/engine/worker.py", [json.dumps(cases)], timeout=900)
    (alone,) = run_ranks(1, "tests/engine/worker.py", [json.dumps(cases)], timeout=900)
    assert len(cases) > 100
    for name in cases:
        assert first[name]["loss_error"] <= 1e-5, name
        assert first[name]["norm_error"] <= 1e-5, name
        for part in ("losses", "norms", "gradients", "weights"):
            assert first[name][part] == second[name][part] == alone[name][part], (name, part)
