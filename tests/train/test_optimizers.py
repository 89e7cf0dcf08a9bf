"""The command with every optimizer, with gradient release across a resumption, and what it says of the states."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from train.launching import Outcome, Workspace, raw_tensors, succeeded

RELEASED = (
    "optimizer.in_backward=true",
    "optimizer.state_bits=8",
    "optimizer.clip_norm=0.1",
    "optimizer.statistics_every=2",
    "run.save_every=2",
    "run.steps=4",
)
HALF = (  # the scale doubles at every step, until gradients overflow
    "model.dtype=float16",
    "numerics.loss_scale_window=1",
    "run.save_every=7",
    "run.steps=14",
    "run.eval_every=null",
)
COMMANDS = {
    "released": (*RELEASED, "run.dir=released"),
    "lion": ("optimizer.name=lion", "optimizer.state_bits=8", "optimizer.betas=[0.9, 0.99]", "run.dir=lion"),
    "sgd": ("optimizer.name=sgd", "optimizer.statistics_every=1", "run.dir=sgd"),
    "half": (*HALF, "run.dir=half"),
    "impossible": ("optimizer.in_backward=true", "numerics.spikes=skip", "run.dir=impossible"),
}


@pytest.fixture(scope="module")
def outcomes(workspace: Workspace) -> dict[str, Outcome]:
    commands = {name: ("recipe.yaml", *arguments) for name, arguments in COMMANDS.items()}
    return workspace.train_many(commands)[0]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def test_a_released_run_goes_on_from_a_checkpoint_to_the_same_bits(workspace, outcomes):
    succeeded(outcomes["released"])
    again = workspace.folder / "again"
    shutil.copytree(workspace.folder / "released", again)
    shutil.rmtree(again / "final")
    shutil.rmtree(again / "checkpoints" / "step-000004")
    (again / "COMPLETE").unlink()
    succeeded(workspace.train("recipe.yaml", *RELEASED, "run.dir=again"))
    first, second = (workspace.folder / name for name in ("released", "again"))
    assert raw_tensors(first / "final") == raw_tensors(second / "final")
    assert [s["loss"] for s in steps_of(first)] == [s["loss"] for s in steps_of(second)]
    plan = json.loads((first / "plan.json").read_text())
    assert plan["clipping"].startswith("by the last step's global norm")


def test_a_float16_run_leaves_steps_out_that_overflow_and_goes_on_to_the_same_bits(workspace, outcomes):
    succeeded(outcomes["half"])
    assert "this step's update is left out, loss scale" in outcomes["half"].stdout
    found = steps_of(workspace.folder / "half")
    assert [s["grad_norm"] is None for s in found] == [bool(s.get("skipped")) for s in found]
    assert any(s.get("skipped") for s in found[:7])  # before the checkpoint, and after it
    assert any(s.get("skipped") for s in found[7:])
    again = workspace.folder / "half-again"
    shutil.copytree(workspace.folder / "half", again)
    shutil.rmtree(again / "final")
    shutil.rmtree(again / "checkpoints" / "step-000014")
    (again / "COMPLETE").unlink()
    succeeded(workspace.train("recipe.yaml", *HALF, "run.dir=half-again", ranks=2))
    assert raw_tensors(again / "final") == raw_tensors(workspace.folder / "half" / "final")
    assert {kind for kind, _, _ in raw_tensors(again / "final").values()} == {"F16"}


def test_metrics_say_how_the_states_are(workspace, outcomes):
    succeeded(outcomes["released"])
    said = {"update_over_lr_max", "v_at_floor", "v_zero", "v_bias"}
    found = [said & record.keys() for record in steps_of(workspace.folder / "released")]
    assert found == [set(), said, set(), said]


@pytest.mark.parametrize("name", ["lion", "sgd"])
def test_other_optimizers_train(workspace, outcomes, name):
    succeeded(outcomes[name])
    losses = [record["loss"] for record in steps_of(workspace.folder / name)]
    assert len(losses) == 3
    assert raw_tensors(workspace.folder / name / "final")
    if name == "sgd":
        assert all("update_over_lr_max" in record for record in steps_of(workspace.folder / name))


def test_skipping_leaps_and_gradient_release_exclude_each_other(outcomes):
    outcome = outcomes["impossible"]
    assert outcome.code == 64
    assert "numerics.spikes: skip cannot be had with optimizer.in_backward" in outcome.stderr
