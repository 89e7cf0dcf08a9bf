"""The account of the main thread's work is made; how long it takes is for `make bench` to say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_way_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "benchmarks/main_thread.py"), "--quick", "--out", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(out.read_text())
    assert found["task"] > 0
    assert set(found["ways"]) == {"waiting", "running ahead", "compiled layers", "both"}
    assert "ns a parameter" in ended.stdout
