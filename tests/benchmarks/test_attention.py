"""The comparison of attention with MLX's own runs; its ratios are for `make bench` to say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_patterns_and_a_step_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    script = str(ROOT / "benchmarks/attention.py")
    command = [sys.executable, script, "--lengths", "1024", "--steps", "300x1", "--out", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    *patterns, step = json.loads(out.read_text())
    assert [one["pattern"] for one in patterns] == ["causal", "8 documents", "window S/8", "chunks S/4"]
    assert all(one["peak"] < 0.7 for one in patterns)
    assert -0.01 <= step["predicted"] / step["measured"] - 1 <= 0.04
