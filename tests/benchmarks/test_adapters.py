"""The comparison of LoRA with mlx-lm's runs: the same work on both sides, less memory on ours.

How fast either is, is for `make bench` to say on a quiet machine.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_pairs_of_a_tiny_model_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks/adapters.py"),
        "--quick",
        "--steps",
        "2",
        "--out",
        str(out),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    pairs = json.loads(out.read_text())["pairs"]
    assert len(pairs) == 3
    for name, ((ours, peer),) in pairs.items():
        # Of so small a model the rest is as large as what is saved, but for this case.
        assert ours["peak_bytes"] < peer["peak_bytes"] or name != "LoRA, recomputed"
        losses = zip(ours["losses"], peer["losses"], strict=True)
        assert all(abs(a - b) < 1e-3 * b for a, b in losses)


@pytest.mark.slow
def test_the_table_of_daughters_is_made(tmp_path: Path) -> None:
    model = ROOT / "tests/fixtures/tiny-llama-260k"
    ways = ["LoRA, base in float32", "LoRA on a ternary base"]
    script = str(ROOT / "benchmarks/daughters_table.py")
    command = [sys.executable, script, "--model", str(model), "--steps", "2", "--rows", "2", "--ways", *ways]
    ended = subprocess.run(
        [*command, "--out", str(tmp_path / "t.json")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {way}" for way in ways]
    found = json.loads((tmp_path / "t.json").read_text())["ways"]
    plain, ternary = (found[way] for way in ways)
    assert ternary["base_bytes"] < plain["base_bytes"]
    assert ternary["before"] > plain["before"]
    assert all(one["after"] < one["before"] for one in found.values())
