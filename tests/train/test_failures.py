"""A run that fails in the middle leaves nothing that looks finished, says who failed, and can be started again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from train.launching import MODEL, Outcome, Workspace, jsonl, metrics, raw_tensors, succeeded

from mlx_empire.data.order import Shuffled
from mlx_empire.plan.workload import cell_layout

ROWS, POISON, FAILING_STEP, FAILING_RANK = 12, 300, 2, 1


def poisoned_model(folder: Path) -> None:
    """The tiny llama with a head of its own, and an embedding whose row for one token is infinite."""
    shutil.copytree(MODEL, folder)
    config = json.loads((MODEL / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: mx.array(w) for name, w in mx.load(str(MODEL / "model.safetensors")).items()}
    table = np.array(weights["model.embed_tokens.weight"].astype(mx.float32))
    weights["lm_head.weight"] = mx.array(table).astype(mx.float16)
    table[POISON] = np.inf
    weights["model.embed_tokens.weight"] = mx.array(table).astype(mx.float16)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def poisoned_rows() -> list[dict[str, list[int]]]:
    """Rows without the poison, but for the one that the failing rank reads first in the failing step."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, POISON, 65).tolist() for _ in range(ROWS)]
    micro = cell_layout(6, 1, 4, 2).of_rank(FAILING_RANK)[0][0]
    (row,) = Shuffled(ROWS, 0).rows_at((FAILING_STEP - 1) * 6 + micro, 1)
    rows[row][7] = POISON
    return [{"tokens": row} for row in rows]


@pytest.fixture(scope="module")
def failed(workspace: Workspace) -> tuple[Path, Outcome]:
    poisoned_model(workspace.folder / "poisoned")
    workspace.write("poisoned.jsonl", jsonl(poisoned_rows()))
    settings = ["model.path=poisoned", "data.path=poisoned.jsonl", "data.format=tokens", "run.dir=failed"]
    return workspace.folder / "failed", workspace.train(
        "recipe.yaml", *settings, "memory.zero_stage=3", ranks=2
    )


def test_the_failing_rank_is_named(failed: tuple[Path, Outcome]) -> None:
    _, outcome = failed
    assert outcome.code == 65
    assert "Traceback" not in outcome.stderr
    assert "the loss is nan" in outcome.said[0]
    assert f"rank {FAILING_RANK} (" in outcome.said[0]


def test_the_failure_is_said_once(failed: tuple[Path, Outcome]) -> None:
    _, outcome = failed
    assert len(outcome.said) == 1, outcome.said


def test_nothing_looks_finished(failed: tuple[Path, Outcome]) -> None:
    run, _ = failed
    assert {path.name for path in run.iterdir()} == {"recipe.yaml", "plan.json", "metrics.jsonl"}
    assert [record["step"] for record in metrics(run)] == list(range(1, FAILING_STEP))


def test_an_unfinished_run_starts_over_and_says_so(
    workspace: Workspace, failed: tuple[Path, Outcome]
) -> None:
    run, _ = failed
    ended = succeeded(workspace.train("recipe.yaml", "run.dir=failed", "run.steps=1"))
    assert "an unfinished run lay here" in ended.stdout
    assert "starts at step 1" in ended.stdout
    assert [record["step"] for record in metrics(run)] == [1]
    assert len(json.loads((run / "plan.json").read_text())["ranks"]) == 1
    assert (run / "COMPLETE").exists()
    assert len(raw_tensors(run / "final")) == 47
