"""The comparison with mlx-lm's trainer on unequal documents: all three ways run, and ours has the padded one's losses.

How fast and how small either is, is for `python benchmarks/beside.py` to say, with models that are large enough.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_round_of_a_tiny_model_does_the_same_work_three_times(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    cases = [f"tests/fixtures/tiny-llama-260k-{tuning}-64" for tuning in ("full", "lora")]
    command = [sys.executable, str(ROOT / "benchmarks" / "beside.py"), "--cases", *cases]
    ended = subprocess.run(
        [*command, "--rounds", "1", "--steps", "1", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr + ended.stdout
    found = json.loads(out.read_text())["cases"]
    assert list(found) == cases
    for case in found.values():
        (one,) = case["rounds"]
        assert set(one) == {"ours", "padded", "one row"}
        assert one["ours"]["losses"] == pytest.approx(one["padded"]["losses"], rel=1e-3)
        assert one["one row"]["losses"] != pytest.approx(one["padded"]["losses"], rel=1e-3), "others are seen"
        assert all(run["cpu_seconds"] > 0 for run in one.values())
        assert all(run["peak"] > 0 for run in one.values())
    assert found[cases[1]]["stays"] < found[cases[0]]["stays"]
