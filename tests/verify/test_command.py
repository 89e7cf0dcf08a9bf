"""`python -m mlx_empire.verify` on a small recipe, alone on the model itself and on two ranks with it scaled down."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.mpi import mpirun, rank_environment

from mlx_empire.verify import command

FIXTURES = Path(__file__).parents[1] / "fixtures"
RECIPE = f"""
model: {{path: {FIXTURES}/tiny-llama-260k, dtype: bfloat16}}
data: {{path: {FIXTURES}/wordnet, format: chat, sequence_length: 64, packing: true}}
batch: {{global_size: 4, micro_size: 2, cells: 2}}
optimizer: {{learning_rate: 1.0e-3, state_bits: 8, in_backward: true}}
memory: {{gradient_checkpointing: true, zero_stage: 3, shares: [2, 1]}}
run: {{dir: run, steps: 3}}
"""


def verify(folder: Path, *arguments: str, ranks: int) -> tuple[int, dict[str, dict], str]:
    (folder / "recipe.yaml").write_text(RECIPE)
    launcher = [mpirun(), "--oversubscribe", "-n", str(ranks)] if ranks else []
    command = [*launcher, sys.executable, "-m", "mlx_empire.verify", "recipe.yaml", *arguments]
    command += ["--json", "found.json", "--html", "found.html"]
    ended = subprocess.run(
        command, cwd=folder, env=rank_environment(str(folder)), capture_output=True, text=True, timeout=400
    )
    assert (folder / "found.json").exists(), ended.stderr[-3000:]
    found = json.loads((folder / "found.json").read_text())
    return ended.returncode, {one["name"]: one for one in found["techniques"]}, ended.stdout


@pytest.mark.parametrize(
    ("ranks", "arguments", "more"),
    [
        (0, ("--own", "memory.shares=equal"), set()),
        pytest.param(2, (), {"unequal shares"}, marks=pytest.mark.slow),
    ],
)
def test_what_must_be_identical_is(tmp_path, ranks, arguments, more):
    code, found, printed = verify(tmp_path, "--steps=2", "--seeds=1", *arguments, ranks=ranks)
    assert code == 0
    identical = {
        "ZeRO stage 3",
        "gradient checkpointing",
        "gradient release, without clipping",
        "16 + 16-bit masters against float32 copies",
    } | more
    assert {name for name, one in found.items() if one["must_be_identical"]} == identical
    assert all(found[name]["identical"] for name in identical)
    for name in ("8-bit optimizer states", "bfloat16, exact masters", "noise floor: start moved by 1e-6"):
        assert not found[name]["identical"], name
        assert abs(found[name]["difference"]) < 0.02
    (packing,) = (one for name, one in found.items() if name.startswith("packing"))
    assert abs(packing["difference"]) < 1e-5
    assert found["8-bit optimizer states"]["saved_bytes"] > 0
    assert "ZeRO" in printed
    page = (tmp_path / "found.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert f"2 steps, 1 seed, {'2 ranks' if ranks else '1 rank'}; differences of" in page


@pytest.mark.parametrize("option", ["--json", "--html"])
@pytest.mark.parametrize(
    ("file", "told"),
    [
        *((name, "is read here") for name in ("recipe.yaml", "hosts.txt", "rows.jsonl")),
        ("nowhere/x", "No such file"),
    ],
)
def test_a_file_that_is_read_or_cannot_be_written_is_refused_before_the_work(
    option, file, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    recipe = RECIPE.replace(f"{FIXTURES}/wordnet", "rows.jsonl")
    texts = {"recipe.yaml": recipe, "hosts.txt": "localhost slots=1\n", "rows.jsonl": "{}\n"}
    for name, text in texts.items():
        Path(name).write_text(text)
    with pytest.raises(SystemExit) as ended:
        command.main(["recipe.yaml", "--hosts", "hosts.txt", option, file, "--steps=1", "--seeds=1"])
    assert ended.value.code == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mlx_empire: {option}: {file}: {told}")
    assert {path.name: path.read_text() for path in Path().iterdir()} == texts
