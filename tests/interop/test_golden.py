"""The golden run in small: a tiny model beside torch for some steps, by the command that makes docs/golden.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("torch", reason="torch is not installed: run `make test-interop`")


def test_a_run_and_a_plain_loop_on_torch_have_the_same_curve(tmp_path: Path) -> None:
    model = ROOT / "tests" / "fixtures" / "tiny-llama-260k"
    kept = tmp_path / "curves.json"
    words = ["--model", str(model), "--steps", "30", "--json", str(kept), "--page", str(tmp_path / "page.md")]
    made = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "golden.py"), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    found = json.loads(kept.read_text())
    ours, theirs = found["mlx-empire"], found["torch"]
    assert [step for step, _ in ours["loss"]] == list(range(1, 31))
    for kind in ("loss", "held out"):
        assert ours[kind] == [[step, pytest.approx(loss, rel=1e-4)] for step, loss in theirs[kind]]
    # Training moves the loss by far more than the two are apart, or they would agree without learning.
    apart = max(abs(a[1] - b[1]) for a, b in zip(ours["held out"], theirs["held out"], strict=True))
    assert abs(ours["held out"][-1][1] - ours["held out"][0][1]) > 10 * apart
    assert "| 30 |" in (tmp_path / "page.md").read_text()
