"""The comparison with mlx-lm's trainer runs: same work on both sides, and a result that says on what it was measured.

How fast either is, is for `make bench` to say on a quiet machine.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_pair_of_a_tiny_model_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "run.py"),
        "--quick",
        "--stages",
        "3",
        "--out",
        str(out),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    (stage,) = json.loads(out.read_text())["stages"]
    (pair,) = stage["pairs"]
    assert stage["reached"] is None  # nothing is asked of a tiny model
    assert pair["ours"]["step_seconds"] > 0
    assert pair["peer"]["step_seconds"] > 0
    losses = zip(pair["ours"]["losses"], pair["peer"]["losses"], strict=True)
    assert all(abs(ours - peer) < 1e-3 * peer for ours, peer in losses)
