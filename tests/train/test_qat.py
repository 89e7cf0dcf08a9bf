"""Ternary training through the command: the warm-up in the records, a continued run's bits, what the result holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from train.launching import Outcome, Workspace, raw_tensors, step_records, succeeded

QAT = (
    "tuning.qat=ternary",
    "tuning.qat_warmup=3",
    "run.steps=5",
    "run.save_every=2",
    "run.eval_every=5",
    "optimizer.statistics_every=null",
)
MATRIX = ("tuning.qat_group=matrix", "model.dtype=bfloat16", "run.dir=matrix")
COMMANDS = {
    "group": (*QAT, "run.dir=group"),
    "matrix": (*QAT, *MATRIX),
    "adapters": ("tuning.type=lora", "tuning.qat=ternary", "run.dir=a"),
    "alone": ("tuning.qat_group=64", "run.dir=b"),
    "too long": ("tuning.qat=ternary", "tuning.qat_warmup=9", "run.dir=c"),
}
REFUSED = {
    "adapters": "tuning.qat: qat has no meaning for type lora",
    "alone": "tuning.qat_group: qat_group has no meaning without tuning.qat",
    "too long": "tuning.qat_warmup: qat_warmup 9 is longer than the whole run, run.steps 3",
}


@pytest.fixture(scope="module")
def outcomes(workspace: Workspace) -> dict[str, Outcome]:
    commands = {name: ("recipe.yaml", *arguments) for name, arguments in COMMANDS.items()}
    return workspace.train_many(commands)[0]


def floats(raw: tuple[str, tuple[int, ...], bytes]) -> np.ndarray:
    """A stored tensor's numbers."""
    dtype, shape, data = raw
    wide = np.frombuffer(data, np.float32 if dtype == "F32" else np.uint16)
    found = wide if dtype == "F32" else (wide.astype(np.uint32) << 16).view(np.float32)
    return found.reshape(shape)


def matrices(folder: Path) -> dict[str, np.ndarray]:
    """The layers' matrices by name; all have whole groups of 64 inputs."""
    found = {name: floats(raw) for name, raw in raw_tensors(folder).items() if ".layers." in name}
    return {name: array for name, array in found.items() if array.ndim == 2}


def is_ternary(weight: np.ndarray, inputs: int) -> bool:
    sizes = np.abs(weight.reshape(-1, inputs))
    return bool(((sizes == 0) | (sizes == sizes.max(axis=1, keepdims=True))).all())


def test_a_run_goes_on_in_its_warm_up_to_the_same_bits(workspace, outcomes):
    succeeded(outcomes["group"])
    first, again = workspace.folder / "group", workspace.folder / "group-again"
    strengths = [record["qat_strength"] for record in step_records(first)]
    assert strengths == [0.0, 1 / 3, 2 / 3, 1.0, 1.0]
    shutil.copytree(first, again)
    shutil.rmtree(again / "final")
    for step in (4, 5):
        shutil.rmtree(again / "checkpoints" / f"step-{step:06d}")
    (again / "COMPLETE").unlink()
    succeeded(workspace.train("recipe.yaml", *QAT, "run.dir=group-again"))
    assert raw_tensors(first / "final") == raw_tensors(again / "final")
    same = [[(r["loss"], r["qat_strength"]) for r in step_records(run)] for run in (first, again)]
    assert same[0] == same[1]


@pytest.mark.parametrize("name", ["group", "matrix"])
def test_the_result_holds_ternary_matrices(workspace, outcomes, name):
    succeeded(outcomes[name])
    found = matrices(workspace.folder / name / "final")
    assert len(found) == 35
    for weight in found.values():
        assert is_ternary(weight, 64 if name == "group" else weight.size)
        assert 0.05 < (weight == 0).mean() < 0.95
    card = (workspace.folder / name / "final" / "README.md").read_text()
    assert "full fine-tuning with ternary weights (quantisation-aware training)" in card
    assert json.loads((workspace.folder / name / "plan.json").read_text())["steps"] == 5


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused(outcomes, name):
    assert outcomes[name].code == 64
    assert REFUSED[name] in outcomes[name].stderr
