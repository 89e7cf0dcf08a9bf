"""A NaN in one rank's loss or gradient stops all ranks before the update and names rank and tensor (N3)."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from support.mpi import mpirun
from train.launching import Workspace, metrics

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def outcomes(workspace: Workspace) -> list[dict[str, Any]]:
    worker = Path(__file__).with_name("poisoned_worker.py")
    ended = workspace._run([mpirun(), "--oversubscribe", "-n", "2", sys.executable, str(worker)], 0o022)
    files = [workspace.folder / f"poisoned-{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), ended.stderr[-4000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("loss", f"step 2: the loss is nan, computed by rank 1 ({HOST}); all weights are finite"),
        ("gradient", f"is not finite, computed by rank 0 ({HOST}); no weight was changed"),
        ("transient", "is not finite, but it is when computed again: a machine's memory"),
    ],
)
def test_all_ranks_stop_before_the_update(
    workspace: Workspace, outcomes: list[dict[str, Any]], case: str, said: str
) -> None:
    assert [one[case]["code"] for one in outcomes] == [65, 65]
    first, *others = [line for one in outcomes for line in one[case]["stderr"].splitlines()]
    assert others == []
    assert said in first
    if case == "gradient":  # of the first tensor of every layer
        assert (
            "step 2: the gradient of model.layers.0.self_attn.q_proj.weight (and of 4 other tensors)" in first
        )
    if case == "transient":  # of the layer whose gradient is ready first
        assert "step 2: the gradient of model.layers.4.self_attn.q_proj.weight is not finite" in first
    run = workspace.folder / case
    assert [record["step"] for record in metrics(run)] == [1]
    left = {"recipe.yaml", "plan.json", "metrics.jsonl", "checkpoints"}
    assert {path.name for path in run.iterdir()} == left
    assert [path.parent.name for path in run.glob("checkpoints/*/COMMIT")] == ["step-000001"]


def test_without_the_variable_a_run_imports_no_fault(outcomes: list[dict[str, Any]]) -> None:
    assert [one["faults imported"] for one in outcomes] == [False, False]
