"""After a leap the run goes back to its last checkpoint and on with later data; interrupted and continued it does the
same. A low threshold makes leaps of this model's ordinary noise."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from reliability.faulty import train
from train.launching import Workspace, curve, raw_tensors, succeeded

SETTINGS = (
    "run.steps=40", "run.save_every=2", "memory.zero_stage=2", "optimizer.state_bits=8",
    "numerics.spikes=rollback", "numerics.threshold=2", "numerics.window=16", "numerics.max_skips=16",
)  # fmt: skip


@pytest.fixture(scope="module")
def told(workspace: Workspace) -> str:
    return " ".join(
        succeeded(workspace.train("recipe.yaml", "run.dir=whole", *SETTINGS, ranks=2)).stdout.split()
    )


def went_back(told: str) -> dict[int, int]:
    """Step of the leap -> step that the weights are of again."""
    found = re.findall(
        r"step (\d+): \S+ .*?the run goes back weights and states are those after step (\d+)", told
    )
    return {int(leap): int(step) for leap, step in found}


def saved(run: Path, step: int) -> list[tuple[str, str, int, str]]:
    """Every array of a checkpoint with its digest."""
    manifest = json.loads((run / "checkpoints" / f"step-{step:06d}" / "MANIFEST.json").read_text())
    pieces = [piece for shard in manifest["shards"] for piece in shard["pieces"]]
    return [(p["tensor"], p["array"], p["first_row"], p["digest"]) for p in pieces]


def test_weights_and_states_are_those_of_the_checkpoint(workspace: Workspace, told: str) -> None:
    """Where the leap's step is itself saved, its checkpoint holds what the one before it held."""
    run = workspace.folder / "whole"
    back = {leap: step for leap, step in went_back(told).items() if leap % 2 == 0}
    assert back
    for leap, step in back.items():
        assert step == leap - 2
        assert saved(run, leap) == saved(run, step)
        assert saved(run, leap) != saved(run, 2)
    skipped = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in skipped if record.get("skipped")] == sorted(went_back(told))


@pytest.mark.faults
def test_a_continued_run_goes_back_alike(workspace: Workspace, told: str) -> None:
    """Killed in the step after a leap, it comes to the same weights and losses."""
    leap = min(went_back(told))
    fault = f"rank=1;step={leap + 1};phase=forward;action=kill"
    assert train(workspace, fault, "run.dir=parts", *SETTINGS).code != 0
    again = train(workspace, "", "run.dir=parts", *SETTINGS)
    assert again.code == 0
    assert "going on after step" in again.outcome.stdout
    whole, parts = workspace.folder / "whole", workspace.folder / "parts"
    assert curve(parts) == curve(whole)
    assert raw_tensors(parts / "final") == raw_tensors(whole / "final")
