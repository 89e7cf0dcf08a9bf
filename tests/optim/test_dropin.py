"""AdamW8bit in other people's loops: bit for bit the trainer's AdamW, compiled or not, saved or not, in mlx-lm too."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import TrainingArgs, train
from support.tiny_models import tiny_model

from mlx_empire.optim import AdamW8bit, dropin
from mlx_empire.optim.adamw import AdamW
from mlx_empire.optim.protocol import ChunkId, StepScalars

SHAPES = {
    "layers.0.weight": (70, 61),
    "layers.1.weight": (128, 64),
    "layers.1.gate.weight": (8, 1024),
    "bias": (70,),
}
RATE = 0.0009765625  # a float32 number, as MLX's own state holds it


def parameters(dtype: mx.Dtype) -> dict[str, Any]:
    flat = [
        (n, (mx.random.normal(s, key=mx.random.key(i)) * 0.05).astype(dtype))
        for i, (n, s) in enumerate(SHAPES.items())
    ]
    return tree_unflatten(flat)


def gradients(step: int, dtype: mx.Dtype) -> dict[str, Any]:
    keys = enumerate(SHAPES.items())
    return tree_unflatten(
        [(n, mx.random.normal(s, key=mx.random.key(100 * step + i)).astype(dtype)) for i, (n, s) in keys]
    )


def equal(a: Any, b: Any) -> bool:
    one, other = dict(tree_flatten(a)), dict(tree_flatten(b))
    assert one.keys() == other.keys()
    return all(one[n].dtype == other[n].dtype and mx.array_equal(one[n], other[n]).item() for n in one)


def rows(a: mx.array) -> mx.array:
    flat = np.zeros(-(-a.size // 64) * 64, np.float32)
    flat[: a.size] = np.array(a.astype(mx.float32)).reshape(-1)
    return mx.array(flat.reshape(-1, 64)).astype(a.dtype)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("master", ["exact", "diet"])
def test_bit_for_bit_the_trainers_adamw(bits: int, dtype: mx.Dtype, master: str) -> None:
    ours = AdamW8bit(RATE, weight_decay=0.1, state_bits=bits, master_weights=master, salt=5)
    flat = AdamW(weight_decay=0.1, state_bits=bits, master_weights=master)
    tree = parameters(dtype)
    theirs = {n: rows(a) for n, a in tree_flatten(tree)}
    states = {n: flat.init(w, quantised="layers" in n and "gate" not in n) for n, w in theirs.items()}
    for step in range(1, 6):
        g = gradients(step, dtype)
        tree = ours.apply_gradients(g, tree)
        for name, grad in tree_flatten(g):
            chunk = ChunkId(zlib.crc32(name.encode()), 0, True)
            theirs[name], states[name] = flat.update(
                theirs[name], states[name], rows(grad), chunk, StepScalars(step, RATE, salt=5)
            )
    for name, array in tree_flatten(tree):
        assert mx.array_equal(array.reshape(-1), theirs[name].reshape(-1)[: array.size]).item(), name
    flat_state = dict(tree_flatten(ours.state))
    for name, state in states.items():
        for key, array in state.items():
            assert mx.array_equal(flat_state[f"{name}.parts.0.{key}"], array).item(), (name, key)
    assert ("layers.0.weight.parts.0.m_codes" in flat_state) == (bits == 8)


def test_large_tensors_in_chunks_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Any:
        optimizer, tree = AdamW8bit(RATE), parameters(mx.bfloat16)
        for step in range(1, 4):
            tree = optimizer.apply_gradients(gradients(step, mx.bfloat16), tree)
        return tree, len(optimizer.state["layers"][1]["weight"]["parts"])

    whole, one = run()
    monkeypatch.setattr(dropin, "_CHUNK_ROWS", 50)
    pieces, three = run()
    assert (one, three) == (1, 3)
    assert equal(whole, pieces)


def test_compiled_steps_give_the_same_bits() -> None:
    schedule = optimizers.linear_schedule(1e-3, 1e-4, 10)

    def run(compiled: bool) -> Any:
        optimizer, tree = AdamW8bit(schedule), parameters(mx.bfloat16)
        optimizer.init(tree)
        step: Callable[..., Any] = optimizer.apply_gradients
        if compiled:
            step = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
        for i in range(1, 6):
            tree = step(gradients(i, mx.bfloat16), tree)
            mx.eval(tree, optimizer.state)
        return tree, optimizer.state

    assert equal(run(False), run(True))


def test_a_saved_state_continues_bitwise(tmp_path: Path) -> None:
    optimizer, tree = AdamW8bit(RATE), parameters(mx.bfloat16)
    for step in (1, 2):
        tree = optimizer.apply_gradients(gradients(step, mx.bfloat16), tree)
    mx.save_safetensors(str(tmp_path / "state.safetensors"), dict(tree_flatten(optimizer.state)))
    again = AdamW8bit(RATE)
    again.state = tree_unflatten(list(mx.load(str(tmp_path / "state.safetensors")).items()))
    g = gradients(3, mx.bfloat16)
    assert equal(again.apply_gradients(g, tree), optimizer.apply_gradients(g, tree))
    assert equal(again.state, optimizer.state)


@pytest.mark.parametrize("correction", [True, False])
def test_with_32_bits_it_is_mlxs_adamw(correction: bool) -> None:
    ours = AdamW8bit(RATE, [0.9, 0.99], 1e-6, 0.1, correction, state_bits=32)
    theirs = optimizers.AdamW(RATE, [0.9, 0.99], 1e-6, 0.1, correction)
    first, second = parameters(mx.float32), parameters(mx.float32)
    for step in range(1, 8):
        g = gradients(step, mx.float32)
        first, second = ours.apply_gradients(g, first), theirs.apply_gradients(g, second)
    for (name, a), (_, b) in zip(tree_flatten(first), tree_flatten(second), strict=True):
        # MLX squares 1 - beta in float32: its corrections are right to about 1e-5.
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=0, atol=2e-5 * RATE * 8, err_msg=name)


def test_float16_keeps_a_master() -> None:
    optimizer, tree = AdamW8bit(2.0**-20), parameters(mx.float16)  # far below half a float16 step of 0.05
    begun = tree
    for _ in range(60):
        tree = optimizer.apply_gradients(tree_map(mx.ones_like, begun), tree)
    (name, array), *_ = tree_flatten(tree)
    assert array.dtype == mx.float16
    moved = np.array(dict(tree_flatten(begun))[name].astype(mx.float32) - array.astype(mx.float32))
    np.testing.assert_allclose(moved.mean(), 60 * 2.0**-20, rtol=0.05)


def test_frozen_parameters_have_no_state_and_stay() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model.layers[0].freeze()
    before = np.array(model.layers[0].weight)
    optimizer = AdamW8bit(1e-2)
    grad = nn.value_and_grad(model, lambda m, x: m(x).square().mean())
    _, g = grad(model, mx.ones((2, 64)))
    moved = np.array(model.layers[1].weight)
    optimizer.update(model, g)
    assert np.array_equal(np.array(model.layers[0].weight), before)
    assert not np.array_equal(np.array(model.layers[1].weight), moved)
    assert {n.split(".")[1] for n, _ in tree_flatten(optimizer.state) if n.startswith("layers")} == {"1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state_bits": 4}, "state_bits"),
        ({"master_weights": "half"}, "master_weights"),
        ({"betas": (1, 0.9)}, "betas"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW8bit(1e-3, **arguments)


def test_integers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"table: .*uint32"):
        AdamW8bit(1e-3).init({"table": mx.zeros((64, 64), mx.uint32)})


class Losses(TrainingCallback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        self.values.append(info["train_loss"])


def test_in_mlx_lms_own_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """mlx-lm's train() compiles its step and accumulates; against its fp32 AdamW on the same batches."""
    rng = np.random.default_rng(0)
    rows_of_text = [((np.arange(33) * int(k) + int(k)) % 256).tolist() for k in rng.integers(1, 6, 64)]

    class Rows:
        def __len__(self) -> int:
            return len(rows_of_text)

        def __getitem__(self, i: int) -> list[int]:
            return rows_of_text[i]

        def process(self, row: list[int]) -> tuple[list[int], int]:
            return row, 0

    ends = []
    for make in (AdamW8bit, optimizers.AdamW):
        build, _ = tiny_model("llama", num_hidden_layers=2)
        mx.random.seed(1)
        np.random.seed(1)
        model = build()
        model.apply(lambda a: a.astype(mx.float32))
        losses = Losses()
        args = TrainingArgs(
            batch_size=4,
            iters=60,
            steps_per_report=20,
            steps_per_save=1000,
            max_seq_length=64,
            adapter_file=tmp_path / "weights.safetensors",
            grad_accumulation_steps=2,
        )
        optimizer = make(optimizers.cosine_decay(3e-3, 60), bias_correction=True)
        train(model, optimizer, CacheDataset(Rows()), args=args, training_callback=losses)
        assert optimizer.step.item() == 30
        ends.append(losses.values)
    capsys.readouterr()
    ours, stock = ends
    assert ours[-1] < 0.7 * ours[0]
    np.testing.assert_allclose(ours, stock, rtol=0.02)
