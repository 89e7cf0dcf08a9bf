"""`python -m mlx_empire.export`: what it refuses, in one line and without writing anything."""

import json
from pathlib import Path

import pytest

from mlx_empire.export.command import main

MODEL = Path(__file__).parents[1] / "fixtures/tiny-llama-260k"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fuse", "x", "out"], "invalid choice: 'fuse'"),
        (["base", str(MODEL), "out"], "--bits: say how the base is packed: 2, 3"),
        (["base", str(MODEL), "out", "--bits", "5"], "--bits: 5: expected one of"),
        (["merge", "x", "out", "--pack", "5"], "--pack: 5: expected one of"),
        (["peft", "x", "out", "--pack", "4"], "--pack: only merge packs its result again"),
        (["merge", "nowhere", "out"], "nowhere/adapter_config.json: No such file"),
        (["peft", "empty", "out", "--model", str(MODEL)], "neither adapters.safetensors nor"),
        (["peft", "unnamed", "out"], "--model: unnamed does not name its base's folder"),
        (["merge", "full", "out"], "its final/ is a whole model already"),
        (["merge", "unfinished", "out"], "no final/ yet"),
        (["base", str(MODEL), "taken", "--bits", "4"], "taken: exists and holds files"),
    ],
)
def test_refusals(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = (
        "model: {path: m}\ndata: {path: d, sequence_length: 8}\nbatch: {global_size: 1}\n"
        "optimizer: {learning_rate: 1e-3}\nrun: {dir: r, steps: 1}\n"
    )
    files = {
        "full/recipe.yaml": recipe,
        "unfinished/recipe.yaml": recipe + "tuning: {type: lora}\n",
        "unnamed/adapter_config.json": json.dumps({"r": 1}),
        "empty/nothing": "",
        "taken/thesis.txt": "the work of years",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 64
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert message in said[0]
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == set(files)
