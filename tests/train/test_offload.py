"""Runs whose layers' inputs go to a file: the same result in less memory, and a line where the disk has no room."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from train.launching import Workspace, curve, jsonl, raw_tensors, succeeded
from train.test_result import TRAIN, VALID
from train.test_waves import RECIPE

from mlx_empire.train import command as train

ON = "memory.activation_offload=true"


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path)
    made.write("recipe.yaml", RECIPE)
    for name, rows in (("train", TRAIN), ("valid", VALID)):
        made.write(f"rows/{name}.jsonl", jsonl({"tokens": tokens} for tokens in rows))
    return made


def test_the_result_is_the_same_and_the_peak_the_ledgers_and_less(place: Workspace, tmp_path: Path) -> None:
    kept = succeeded(place.train("recipe.yaml", "run.dir=kept"))
    offloaded = succeeded(place.train("recipe.yaml", "run.dir=offloaded", ON, "report.trace=true"))
    assert "go to a file of each rank" in offloaded.stdout
    assert "go to a file of each rank" not in kept.stdout
    assert curve(tmp_path / "offloaded") == curve(tmp_path / "kept")
    assert raw_tensors(tmp_path / "offloaded" / "final") == raw_tensors(tmp_path / "kept" / "final")
    peaks = []
    for name in ("kept", "offloaded"):
        record = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-2])
        assert record["peak_bytes"][0] <= 1.01 * record["predicted_peak_bytes"][0]
        peaks.append(record["peak_bytes"][0])
    assert peaks[1] < 0.8 * peaks[0]
    assert json.loads((tmp_path / "offloaded" / "plan.json").read_text())["activation_offload"] is True
    assert not list((tmp_path / "offloaded").rglob(".unnamed-*"))
    events = json.loads((tmp_path / "offloaded" / "trace.json").read_text())["traceEvents"]
    for process in {event["pid"] for event in events}:  # measured, and as the clock predicts
        drawn = {e["name"].split()[0] for e in events if e["pid"] == process and e.get("cat") == "disk"}
        assert {"offload", "prefetch"} <= drawn


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    asked = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]
    if subprocess.run(asked, check=False).returncode:
        pytest.skip("file systems may not be mounted here (that needs root on Linux)")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("noticed", ["before", "late"])
def test_a_disk_without_room_is_refused_in_a_line(
    place: Workspace,
    small_disk: Path,
    noticed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the disk plan; and, where another program takes the room after that, when the file takes its own."""
    monkeypatch.chdir(small_disk.parent)
    if noticed == "late":
        roomy = shutil.disk_usage("/")._replace(free=1 << 40)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: roomy)
    words = ["recipe.yaml", "run.dir=run", "run.save_every=null", f"run.checkpoints={small_disk}/inputs", ON]
    with pytest.raises(SystemExit) as left:
        train.main(words)
    assert left.value.code == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mlx_empire: ")]
    if noticed == "late":
        assert f"memory.activation_offload: {small_disk}/inputs: the disk is full" in line
        assert "name another disk by run.checkpoints, or use false" in line
    else:
        assert "of layers' inputs" in line
        assert "or try memory.activation_offload: false" in line
    assert not list(small_disk.iterdir())
