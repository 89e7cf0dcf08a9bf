"""One process from recipe to folder: what a run leaves, for whom it is readable, what a second start does."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from train.launching import MODEL, Outcome, Workspace, held_out, metrics, raw_tensors, step_records, succeeded

from mlx_empire.cluster.hostfile import Node
from mlx_empire.data.splits import load_splits
from mlx_empire.recipe.load import load_recipe
from mlx_empire.run.job import Job

# DESIGN, "What a run leaves behind"
FIELDS = {
    "step": int,
    "epoch": float,
    "loss": float,
    "learning_rate": float,
    "grad_norm": float,
    "tokens": int,
    "tokens_per_second": float,
    "positions": int,
    "positions_per_second": float,
    "step_seconds": float,
    "comm_wait_seconds": float,
    "waited_for": dict,
    "time": float,
    "executed_tflops": float,
    "peak_bytes": list,
    "cache_bytes": list,
    "predicted_peak_bytes": list,
    "bytes_sent": list,
    "bytes_received": list,
}


def test_a_run_leaves_exactly_what_it_promises(alone_dir: Path) -> None:
    assert {entry.name for entry in alone_dir.iterdir()} == {
        "recipe.yaml",
        "plan.json",
        "metrics.jsonl",
        "final",
        "COMPLETE",
        "report.html",
    }


def test_nothing_is_readable_by_others_whatever_the_umask(alone_dir: Path) -> None:
    for path in (alone_dir, *alone_dir.rglob("*")):
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_the_recipe_is_kept_as_it_was_resolved(workspace: Workspace, alone_dir: Path) -> None:
    settled = "numerics.attention=pattern"  # what auto comes to stands there for whoever goes on
    asked = load_recipe(workspace.folder / "recipe.yaml", ["run.dir=alone", "run.eval_every=3", settled])
    assert load_recipe(alone_dir / "recipe.yaml") == asked


def test_every_step_has_every_field(alone_dir: Path) -> None:
    records = step_records(alone_dir)
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        assert {name: type(record[name]) for name in FIELDS} == FIELDS
        assert 0 < record["loss"] < math.log(512)  # better than guessing among 512 tokens
        assert 0 < record["grad_norm"] < 100
        assert 0 <= record["comm_wait_seconds"] <= record["step_seconds"]
        assert record["tokens"] <= record["positions"] <= 6 * 64
        for counted in ("tokens", "positions"):
            rate = record[counted] / record["step_seconds"]
            assert math.isclose(record[f"{counted}_per_second"], rate, rel_tol=1e-9)
        assert record["bytes_sent"] == record["bytes_received"] == [0]
    # The cosine from 1e-3 at step 1 to a tenth of it after step 3: (1 + cos(pi p)) / 2 is 1, 3/4 and 1/4.
    assert [record["learning_rate"] for record in records] == pytest.approx([1e-3, 7.75e-4, 3.25e-4])


def test_executed_operations_are_those_of_a_count_by_hand(alone_dir: Path) -> None:
    """2 per weight and position in a pass forward, 4 backward, 2 where a layer is run again; attention's two products
    beside them, over all positions of a row. The chip of this machine is not known, so there is no part of it."""
    config = json.loads((MODEL / "config.json").read_text())
    sizes = {name: math.prod(shape) for name, (_, shape, _) in raw_tensors(MODEL).items()}
    layers = sum(size for name, size in sizes.items() if ".layers." in name)
    root = sum(sizes.values()) - layers
    count = config["num_hidden_layers"]
    again = (count - json.loads((alone_dir / "plan.json").read_text())["tail"]) / count
    for record in step_records(alone_dir):
        width = record["positions"] // 6
        attention = count * 2 * 2 * config["hidden_size"] * width
        each = 6 * (layers + root) + 2 * again * layers + (3 + again) * attention
        executed = record["executed_tflops"] * 1e12 * record["step_seconds"]
        assert executed == pytest.approx(each * record["positions"], rel=1e-6)
        assert record["chip_fraction"] is None
        assert sum(record["waited_for"].values()) == pytest.approx(record["comm_wait_seconds"], abs=1e-3)
    times = [record["time"] for record in step_records(alone_dir)]
    assert times == sorted(times)
    assert abs(times[-1] - (alone_dir / "COMPLETE").stat().st_mtime) < 600


def test_memory_is_measured_beside_its_prediction(alone_dir: Path) -> None:
    (planned,) = json.loads((alone_dir / "plan.json").read_text())["ranks"]
    peaks = [record["peak_bytes"] for record in step_records(alone_dir)]
    assert peaks == sorted(peaks)  # since the run's start
    for record in step_records(alone_dir):
        assert record["predicted_peak_bytes"] == [planned["peak_bytes"]]
        assert (
            3 * 4 * 279_232 < record["peak_bytes"][0] <= 1.1 * planned["peak_bytes"]
        )  # weights, m and v at least


@pytest.fixture(scope="module")
def many_lengths(workspace: Workspace) -> Path:
    """The folder of a run on rows of many lengths."""
    rows = [{"tokens": [1 + j % 250 for j in range(2 + 97 * i % 600)]} for i in range(60)]
    workspace.write("lengths/train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.path={workspace.folder / 'lengths'}", "data.format=tokens", "data.sequence_length=600"]
    succeeded(workspace.train("recipe.yaml", "run.dir=lengths-run", *data, "run.steps=8"))
    return workspace.folder / "lengths-run"


def test_rows_of_many_lengths_leave_no_more_freed_memory_than_the_peak(many_lengths: Path) -> None:
    """Every length leaves buffers of another size, which the next row does not take up."""
    records = step_records(many_lengths)
    held = [record["cache_bytes"][0] for record in records]
    assert max(held) <= records[-1]["predicted_peak_bytes"][0]
    assert max(held) > 0.5 * records[-1]["peak_bytes"][0]  # or the rows were no test


def test_a_step_s_loss_is_the_mean_over_its_own_targets(workspace: Workspace, many_lengths: Path) -> None:
    """The first step's, before any update: that of mlx-lm's whole model by MLX's own cross entropy on the same rows."""
    recipe = load_recipe(workspace.folder / "recipe.yaml")
    splits = load_splits(path=workspace.folder / "lengths", format="tokens", sequence_length=600)
    first, second, *_ = step_records(many_lengths)
    assert first["tokens"] != second["tokens"], "the counts of two steps must differ, or nothing is seen"
    model, _ = mlx_lm.load(str(MODEL))
    model.set_dtype(mx.float32)
    total = counted = 0.0
    for batch in Job.of(recipe, splits.train).batches(1):
        losses = nn.losses.cross_entropy(model(mx.array(batch.inputs)), mx.array(batch.targets))
        total += (losses * mx.array(batch.mask)).sum().item()
        counted += float(batch.mask.sum())
    assert first["tokens"] == counted
    assert first["loss"] == pytest.approx(total / counted, rel=1e-5)


def test_evaluations_come_before_the_first_and_after_the_last_step(alone_dir: Path) -> None:
    kinds = ["eval" if "eval_loss" in record else "step" for record in metrics(alone_dir)]
    assert kinds == ["eval", "step", "step", "step", "eval"]
    losses = held_out(alone_dir)
    assert [step for step, _ in losses] == [0, 3]
    assert all(0 < loss < math.log(512) for _, loss in losses)


def test_the_plan_is_complete(alone_dir: Path) -> None:
    plan = json.loads((alone_dir / "plan.json").read_text())
    assert plan["parameters"] == 279_232
    assert (plan["dtype"], plan["gradient_dtype"], plan["cells"]) == ("float32", "float32", 4)
    assert plan["zero_stage"] in (0, 1, 2, 3)
    (only,) = plan["ranks"]
    assert only["share"] == 1.0
    assert sum(only["ledger"].values()) == only["peak_bytes"] <= only["limit_bytes"]
    assert Node(**only["node"]).limit_bytes == only["limit_bytes"]


def test_the_terminal_tells_the_run(alone: Outcome, alone_dir: Path) -> None:
    for record in step_records(alone_dir):
        assert f"step {record['step']}/3  loss {record['loss']:.4f}" in alone.stdout
    for _, loss in held_out(alone_dir):
        assert f"eval loss {loss:.4f}" in alone.stdout
    assert str(MODEL) in alone.stdout
    assert "the trained model is in alone/final" in alone.stdout


def test_a_finished_run_is_not_trained_over(workspace: Workspace, alone_dir: Path) -> None:
    before = {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in alone_dir.rglob("*") if path.is_file()
    }
    again = workspace.train("recipe.yaml", "run.dir=alone")
    assert again.code == 64
    assert again.stderr.splitlines() == [
        "mlx_empire: run.dir: alone holds a finished run; choose another run.dir or remove that folder"
    ]
    assert again.stdout == ""
    assert before == {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in alone_dir.rglob("*") if path.is_file()
    }
