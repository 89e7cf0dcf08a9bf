"""What comes out is the trained model: against a textbook trainer, against mlx-lm's own loading, against the source.

The textbook trainer knows nothing of ours: mlx-lm's whole model, one row at a time, unpadded, and AdamW in fp64.
Every step reads all six rows, so the order of the data does not matter to it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from train.launching import MODEL, Workspace, curve, held_out, jsonl, raw_tensors, step_records, succeeded

RATE, BETAS, EPS, DECAY, CLIP, STEPS = 1e-5, (0.9, 0.95), 1e-8, 0.1, 1.0, 3
LENGTHS = (
    65,
    40,
    12,
    33,
    2,
    64,
)  # a row may have one token more than sequence_length; one has a single target
SETTINGS = [
    "data.path=rows",
    "data.format=tokens",
    "schedule.type=linear",
    "schedule.final=0",
    f"optimizer.learning_rate={RATE}",
    f"optimizer.betas=[{BETAS[0]},{BETAS[1]}]",
    f"optimizer.weight_decay={DECAY}",
    "run.eval_every=3",
    "run.eval_batches=null",
]


def rows(seed: int, lengths: tuple[int, ...]) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 512, length).tolist() for length in lengths]


TRAIN, VALID = rows(1, LENGTHS), rows(2, (65, 9, 30))


def summed_loss(model: nn.Module, tokens: list[int]) -> mx.array:
    """Cross-entropy of a row, summed over its targets."""
    logits = model(mx.array([tokens[:-1]])).astype(mx.float32)
    return nn.losses.cross_entropy(logits, mx.array([tokens[1:]])).sum()


def mean_loss(model: nn.Module, data: list[list[int]]) -> float:
    total: float = sum(summed_loss(model, tokens).item() for tokens in data)
    return total / sum(len(tokens) - 1 for tokens in data)


def textbook() -> tuple[list[tuple[int, float, float]], dict[str, np.ndarray]]:
    """(step, loss, gradient norm) of each step and the weights after the last, in fp64."""
    model, _ = mlx_lm.load(str(MODEL))
    model.set_dtype(mx.float32)
    count = sum(len(tokens) - 1 for tokens in TRAIN)
    weights = {name: np.array(w, np.float64) for name, w in tree_flatten(model.trainable_parameters())}
    first = {name: np.zeros_like(w) for name, w in weights.items()}
    second = {name: np.zeros_like(w) for name, w in weights.items()}
    told = []
    for step in range(1, STEPS + 1):
        loss, gradient = 0.0, {name: np.zeros_like(w) for name, w in weights.items()}
        for tokens in TRAIN:
            value, tree = nn.value_and_grad(model, lambda row: summed_loss(model, row))(tokens)
            loss += value.item() / count
            for name, g in tree_flatten(tree):
                gradient[name] += np.array(g, np.float64) / count
        rate = RATE * (1 - (step - 1) / STEPS)  # of the linear schedule
        norm = float(np.sqrt(sum((g**2).sum() for g in gradient.values())))
        told.append((step, loss, norm))
        for name, w in weights.items():
            g = gradient[name] * min(1.0, CLIP / norm)
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * g
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * g**2
            m, v = first[name] / (1 - BETAS[0] ** step), second[name] / (1 - BETAS[1] ** step)
            decay = DECAY * w if w.ndim > 1 else 0.0
            weights[name] = w - rate * (m / (np.sqrt(v) + EPS) + decay)
        model.update(tree_unflatten([(name, mx.array(w.astype(np.float32))) for name, w in weights.items()]))
    return told, weights


@pytest.fixture(scope="module")
def runs(workspace: Workspace, alone_dir: Path) -> Path:
    """One launch: the textbook's run, then `alone`'s result and the source model through runs that change nothing."""
    workspace.write("rows/train.jsonl", jsonl({"tokens": row} for row in TRAIN))
    workspace.write("rows/valid.jsonl", jsonl({"tokens": row} for row in VALID))
    still = ["optimizer.learning_rate=1e-30", "run.steps=1", "run.eval_every=1"]
    commands = {
        "textbook": ["recipe.yaml", *SETTINGS, "run.dir=textbook"],
        "after alone": ["recipe.yaml", f"model.path={alone_dir / 'final'}", *still, "run.dir=after-alone"],
        "still": ["recipe.yaml", *still, "run.dir=still"],
        "stored": ["recipe.yaml", "model.dtype=null", *still, "run.dir=stored"],
    }
    for outcomes in workspace.train_many(commands, ranks=2):
        for outcome in outcomes.values():
            succeeded(outcome)
    return workspace.folder


def test_steps_are_the_textbook_s(runs: Path) -> None:
    expected, weights = textbook()
    found = curve(runs / "textbook")
    assert [step for step, _, _ in found] == [1, 2, 3]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert expected[0][2] > CLIP  # so clipping was seen
    assert {record["tokens"] for record in step_records(runs / "textbook")} == {sum(LENGTHS) - len(LENGTHS)}
    model, _ = mlx_lm.load(str(runs / "textbook" / "final"))
    trained = dict(tree_flatten(model.trainable_parameters()))
    assert trained.keys() == weights.keys()
    worst = max(np.abs(np.array(trained[name], np.float64) - w).max() for name, w in weights.items())
    assert worst <= 1e-5
    source, _ = mlx_lm.load(str(MODEL))
    moved = [np.abs(np.array(w, np.float64) - weights[n]).max() for n, w in tree_flatten(source.parameters())]
    assert min(moved) > worst  # every tensor was trained, by more than the difference


def test_held_out_losses_are_those_of_the_folders(runs: Path) -> None:
    for (step, loss), folder in zip(
        held_out(runs / "textbook"), (MODEL, runs / "textbook" / "final"), strict=True
    ):
        model, _ = mlx_lm.load(str(folder))
        model.set_dtype(mx.float32)
        assert loss == pytest.approx(mean_loss(model, VALID), rel=1e-5), step


def test_the_exported_folder_is_the_trained_model_to_the_bit(runs: Path, alone_dir: Path) -> None:
    """Loaded again, it has the held-out loss that the trained model had in memory, and goes out unchanged."""
    assert held_out(runs / "after-alone")[0] == (0, held_out(alone_dir)[-1][1])
    assert raw_tensors(runs / "after-alone" / "final") == raw_tensors(alone_dir / "final")


@pytest.mark.parametrize("run", ["still", "stored"])
def test_a_run_that_changes_nothing_exports_its_source(runs: Path, run: str) -> None:
    """float16 sources are computed in float32, which holds all their values."""
    found = raw_tensors(runs / run / "final")
    source = raw_tensors(MODEL)
    assert found.keys() == source.keys()
    for name, (dtype, shape, values) in found.items():
        assert (source[name][0], dtype, shape) == ("F16", "F32", source[name][1])
        expected = np.frombuffer(source[name][2], np.float16).astype(np.float32)
        np.testing.assert_array_equal(np.frombuffer(values, np.float32), expected, err_msg=name)


def test_the_exported_folder_is_complete(alone_dir: Path) -> None:
    final = alone_dir / "final"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (final / name).read_bytes() == (MODEL / name).read_bytes()
    config, source = (json.loads((folder / "config.json").read_text()) for folder in (final, MODEL))
    dtypes = ("dtype", "torch_dtype")
    assert {k: v for k, v in config.items() if k not in dtypes} == {
        k: v for k, v in source.items() if k not in dtypes
    }
    assert {config[key] for key in dtypes if key in config} == {"float32"}
    index = json.loads((final / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in (final / file).read_bytes()[:8192].decode(errors="replace")
    assert index["weight_map"].keys() == raw_tensors(final).keys()


def test_the_exported_folder_speaks(runs: Path, alone_dir: Path) -> None:
    prompt = "The President of the United States"
    mx.disable_compile()  # a few tokens are not worth a C++ compiler's time
    try:
        said: dict[str, Any] = {}
        for name, folder in (
            ("source", MODEL),
            ("still", runs / "still" / "final"),
            ("final", alone_dir / "final"),
        ):
            model, tokenizer = mlx_lm.load(str(folder))
            model.set_dtype(mx.float32)
            assert tokenizer.decode(tokenizer.encode(prompt)) == prompt
            said[name] = mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)
    finally:
        mx.enable_compile()
    assert said["still"] == said["source"]
    assert len(said["final"].split()) >= 3
    assert said["final"] != said["source"]
