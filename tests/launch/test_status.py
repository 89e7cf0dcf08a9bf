"""`status` tells how a run goes from what lies in its folder, whatever state that is in."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mlx_empire.errors import UserError
from mlx_empire.run.launched import LaunchState, RunFolder
from mlx_empire.run.status import status_rows

RECIPE = """\
model: {path: m}
data: {path: d, sequence_length: 8}
batch: {global_size: 1}
optimizer: {learning_rate: 1.0e-3}
run: {dir: run, steps: 100}
"""


def step(number: int, seconds: float = 30.0) -> dict[str, object]:
    return {"step": number, "loss": 4.0 / number, "tokens_per_second": 1234.5, "step_seconds": seconds}


def made(folder: Path, state: LaunchState | None, *records: dict[str, object]) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE.replace("dir: run", f"dir: {folder}"))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if state is not None:
        with RunFolder(folder) as run:
            run.write(state)
    return folder


def test_a_run_under_way(tmp_path: Path) -> None:
    failure = {"rank": 1, "host": "soldier-1", "cause": "was killed by SIGKILL", "step": 9}
    state = LaunchState(started=1000.0, restarts=1, budget=3, machines=["king", "soldier-1"], said="training")
    state.failures.append(failure)
    folder = made(tmp_path / "run", state, step(9), {"step": 9, "eval_loss": 3.25}, step(10))
    for number, committed in ((3, True), (6, True), (9, False)):
        checkpoint = folder / "checkpoints" / f"step-{number:06d}"
        checkpoint.mkdir(parents=True)
        if committed:
            (checkpoint / "COMMIT").touch()
    with RunFolder(folder):
        rows = dict(status_rows(folder, now=1000.0 + 7200))
    assert rows["run"] == f"training, process {os.getpid()} on {os.uname().nodename}"
    assert rows["machines"] == "king, soldier-1"
    assert rows["restarts"] == "1 of 3"
    assert rows["started"] == "2 h 00 min ago"
    assert rows["last failure"] == "rank 1 on soldier-1: was killed by SIGKILL, step 9"
    assert rows["step"] == "10 of 100"
    assert rows["loss"] == "0.4000"
    assert rows["targets/s"] == "1234"
    assert rows["time left"] == "45 min 00 s"
    assert rows["held-out loss"] == "3.2500 after step 9"
    assert rows["last checkpoint"] == "step 6"


def test_a_folder_that_was_moved_shows_its_own_checkpoints(tmp_path: Path) -> None:
    """Its recipe.yaml names the place where the run began."""
    old, new = made(tmp_path / "old", None, step(1)), tmp_path / "new"
    (old / "recipe.yaml").write_text(
        f"model: {{path: m}}\ndata: {{path: d, sequence_length: 8}}\nbatch: {{global_size: 4}}\n"
        f"optimizer: {{learning_rate: 1e-3}}\nrun: {{dir: {old}, steps: 10}}\n"
    )
    (old / "checkpoints" / "step-000003").mkdir(parents=True)
    (old / "checkpoints" / "step-000003" / "COMMIT").touch()
    old.rename(new)
    rows = dict(status_rows(new))
    assert rows["step"] == "1 of 10"
    assert rows["last checkpoint"] == "step 3"


def test_a_launcher_that_is_gone(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", LaunchState(pid=7, host="king", said="training"), step(1))
    assert dict(status_rows(folder))["run"] == "its launcher (process 7 on king) is gone without a word"


def test_a_run_that_ended_says_how_to_go_on(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", LaunchState(said="stopped", code=143, command="again"), step(1))
    rows = dict(status_rows(folder))
    assert rows["run"] == "ended: stopped, exit code 143"
    assert rows["to go on"] == "again"
    (folder / "COMPLETE").touch()
    assert dict(status_rows(folder))["run"] == "complete"


def test_a_run_without_a_launcher(tmp_path: Path) -> None:
    rows = dict(status_rows(made(tmp_path / "run", None, step(4))))
    assert "without mlx-empire launch" in rows["run"]
    assert rows["last checkpoint"] == "none"


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_without_a_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"no such folder|no run has been here"):
        status_rows(tmp_path / name)


def test_a_state_that_cannot_be_read(tmp_path: Path) -> None:
    for content in ("{", "[]", '{"unknown": 1}'):
        (tmp_path / "launch.json").write_text(content)
        with pytest.raises(UserError, match=r"launch\.json"):
            status_rows(tmp_path)
