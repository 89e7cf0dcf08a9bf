"""Gradients of bfloat16 models: each micro-batch's by mlx-lm's whole model, added up by numpy.

Weights are rounded to bfloat16 and the whole model is differentiated for one micro-batch at a time. A cell's are added
in float32, rounded once to bfloat16 (scales and biases are exchanged in float32), and cells are added in float32. No
sum of ours takes part: one that is made in bfloat16, or rounded twice, or in another order, is another number.

MLX's CPU has no stacked product in bfloat16. Here mixtures of experts have one that is rounded from float32, in the
reference as in ours, so what is added, rounded and exchanged is compared for them as well.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.every_model import models
from support.model_table import refusal
from support.references import our_losses, reference_loss, stock_losses
from support.stepping import (
    Case,
    as_fp32,
    batches_of,
    counted_tokens,
    gathered_gradients,
    rounded_to_bf16,
    trainer_of,
    weights_of,
)

from mlx_empire.comm.buffers import DTYPES
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.plan.workload import cell_layout

# Three micro-batches in one cell, two in the other.
CASE = Case(dtype="bfloat16", micro_batches=5, cells=2, rows=1, width=16)
DAILY = ("llama", "gemma2", "gpt2", "mamba2", "qwen3_moe", "llama4")  # llama4 is Scout's
# What follows the lookup is rounded on the way back in mlx-lm's model, and not in ours, which has it in float32. By
# family the tensors of the embedding, or how their names begin.
MORE_THAN_LOOKED_UP = {
    "longcat_flash_ngram": "model.ngram_embeddings.",
    "muse_glimmer": "model.embed_tokens.weight",
    "nanochat": "transformer.wte.weight",
    "phi3small": "model.embed_tokens.weight",
}


class _Tables(nn.Embedding):
    """An embedding that is looked up in float32, and whose use as a head has a matrix of its own."""

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.weight[tokens].astype(mx.bfloat16)

    def as_linear(self, x: mx.array) -> mx.array:
        return x @ self.head.T


def expected(case: Case) -> tuple[float, dict[str, np.ndarray]]:
    """(mean loss, flat float32 gradients by name)."""
    model, spec, values = weights_of(case)
    tensors = {t.name: t for unit in spec.units for t in unit.tensors}
    model.load_weights(
        [(n, a.astype(DTYPES[tensors[n].dtype]) if n in tensors else a) for n, a in values.items()]
    )
    root = {t.name for t in spec.units[0].tensors}
    tables = [n for n, m in model.named_modules() if type(m) is nn.Embedding and f"{n}.weight" in root]
    for name, module in model.named_modules():
        if name in tables:
            module.__class__ = _Tables
            module.head, module.weight = module.weight, module.weight.astype(mx.float32)
    batches = batches_of(case)
    total = counted_tokens(batches)
    gradient = nn.value_and_grad(model, reference_loss)
    loss, sums = 0.0, {name: np.float32(0) for name in tensors}
    layout = cell_layout(case.micro_batches, case.rows, case.cells, 1)
    for cell in range(layout.cells):
        of_cell: dict[str, np.ndarray] = {}
        for j in layout.members(cell):
            _, tree = gradient(model, batches[j], total, our_losses)
            loss += reference_loss(model, batches[j], total, stock_losses).item()
            for name, array in tree_flatten(tree):
                one = np.array(array.astype(mx.float32)).reshape(-1)
                of_cell[name] = of_cell[name] + one if name in of_cell else one
        for name in tables:
            of_cell[f"{name}.weight"] = of_cell.pop(f"{name}.head") + of_cell[f"{name}.weight"]
        for name, tensor in tensors.items():
            if tensor.kind != "small":
                of_cell[name] = as_fp32(rounded_to_bf16(of_cell[name], ties_to_even=True))
            sums[name] = sums[name] + of_cell[name]
    return loss, sums


@pytest.fixture(autouse=True)
def stacked_products_in_bfloat16(monkeypatch):
    plain = mx.gather_mm

    def product(a, b, *rest, **more):
        return plain(a.astype(mx.float32), b.astype(mx.float32), *rest, **more).astype(a.dtype)

    monkeypatch.setattr(mx, "gather_mm", product)


def compare(case: Case) -> None:
    batches, comm = batches_of(case), SoloCommunicator("here")
    with CommThread() as thread:
        trainer = trainer_of(case, comm, thread)
        loss = trainer.compute(batches, counted_tokens(batches))
        found = gathered_gradients(trainer, comm)
    expected_loss, gradients = expected(case)
    assert loss == pytest.approx(expected_loss, rel=2e-6)
    assert found.keys() == gradients.keys()
    unequal = {name for name, array in gradients.items() if not np.array_equal(found[name], array)}
    embedding = {n for n in gradients if n.startswith(MORE_THAN_LOOKED_UP.get(case.family, "nothing"))}
    assert unequal <= embedding
    for name in embedding:
        assert np.linalg.norm(found[name] - gradients[name]) <= 0.004 * np.linalg.norm(gradients[name]), name


@pytest.mark.parametrize("setting", [{"stage": 0, "tail": 2}, {"stage": 3, "tied": True}], ids=str)
def test_so_they_are_with_a_tail_and_for_a_tied_matrix(setting):
    compare(replace(CASE, family="llama", **setting))


@pytest.mark.parametrize("name", DAILY)
def test_gradients_are_the_whole_models_added_in_float32(name):
    compare(replace(CASE, family=name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in models() if name not in DAILY])
def test_so_they_are_for_every_model_that_trains(name):
    if (line := refusal(name)) is not None:
        assert "\n" not in line
    else:
        compare(replace(CASE, family=name))
