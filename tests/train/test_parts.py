"""The command with `tuning.layers` and `tuning.unfrozen_parameters` of full tuning, from recipe to folder.

What the steps compute is compared with mlx-lm's whole model in `tests/adapters/test_parts.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx_lm
import numpy as np
import pytest
from train.launching import MODEL, Workspace, curve, held_out, jsonl, raw_tensors, succeeded
from train.test_result import TRAIN, VALID, mean_loss

from mlx_empire.cli import main as cli

RECIPE = f"""\
model: {{path: {MODEL}}}
tuning: {{type: full, layers: 1, unfrozen_parameters: [model.norm, 'model\\.layers\\.3\\.mlp']}}
data: {{path: rows, format: tokens, sequence_length: 64}}
batch: {{global_size: 6, micro_size: 1, cells: 3}}
optimizer: {{learning_rate: 1.0e-3}}
run: {{dir: run, steps: 4, save_every: 2, eval_every: 4}}
"""
TRAINED = ("model.layers.4.", "model.layers.3.mlp.", "model.norm.")
SPREAD = {
    2: ["memory.zero_stage=3", "memory.shares=[3,1]"],
    3: ["memory.zero_stage=2", "memory.shares=[1,2,3]"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A run alone, one that goes on from its second step, and spread over two and three ranks."""
    made = Workspace(tmp_path_factory.mktemp("parts"))
    made.write("recipe.yaml", RECIPE)
    for name, rows in (("train", TRAIN), ("valid", VALID)):
        made.write(f"rows/{name}.jsonl", jsonl({"tokens": tokens} for tokens in rows))
    for outcome in made.train_many({"alone": ["recipe.yaml", "run.dir=alone"]})[0].values():
        succeeded(outcome)
    for name in ("halves", "others"):  # as a kill after two steps leaves a run
        shutil.copytree(made.folder / "alone", made.folder / name)
        for left in ("final", "checkpoints/step-000004"):
            shutil.rmtree(made.folder / name / left)
        (made.folder / name / "COMPLETE").unlink()
    for ranks, how in SPREAD.items():
        commands = {f"{ranks}": ["recipe.yaml", *how, f"run.dir=on {ranks}"]}
        if ranks == 2:  # and what one rank began goes on
            commands["halves"] = ["recipe.yaml", *how, "run.dir=halves"]
        for rank in made.train_many(commands, ranks=ranks):
            for outcome in rank.values():
                succeeded(outcome)
    return made


def result(run: Path) -> tuple[Any, ...]:
    return curve(run), held_out(run)[-1:], raw_tensors(run / "final")


@pytest.mark.parametrize("ranks", SPREAD)
def test_bits_do_not_depend_on_the_number_of_ranks(ranks: int, place: Workspace) -> None:
    assert result(place.folder / f"on {ranks}") == result(place.folder / "alone")


def test_a_run_goes_on_to_the_bits_of_one_that_was_never_stopped(place: Workspace) -> None:
    assert raw_tensors(place.folder / "halves/final") == raw_tensors(place.folder / "alone/final")
    assert curve(place.folder / "halves") == curve(place.folder / "alone")


def test_the_result_is_the_whole_model_with_frozen_weights_as_they_were(place: Workspace) -> None:
    before, after = raw_tensors(MODEL), raw_tensors(place.folder / "alone/final")
    assert before.keys() == after.keys()
    changed = set()
    for name, (dtype, shape, raw) in before.items():
        assert (dtype, after[name][:2]) == ("F16", ("F32", shape)), "float32 holds all values of float16"
        if np.frombuffer(raw, np.float16).astype(np.float32).tobytes() != after[name][2]:
            changed.add(name)
    assert changed == {name for name in before if name.startswith(TRAINED)}
    model, _ = mlx_lm.load(str(place.folder / "alone/final"))
    ((_, loss),) = held_out(place.folder / "alone")[-1:]
    assert mean_loss(model, VALID) == pytest.approx(loss, rel=1e-3)
    assert "fine-tuning of parts" in (place.folder / "alone/final/README.md").read_text()


def test_a_checkpoint_holds_what_trains_alone(place: Workspace) -> None:
    (file,) = (place.folder / "alone/checkpoints/step-000004").glob("*.safetensors")
    raw = file.read_bytes()
    kept = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).keys() - {"__metadata__"}
    tensors = {name for name in raw_tensors(MODEL) if any(piece.startswith(name) for piece in kept)}
    assert tensors == {name for name in raw_tensors(MODEL) if name.startswith(TRAINED)}
    assert all(piece.startswith(tuple(tensors)) for piece in kept)


def test_other_parts_do_not_go_on_from_it_even_where_the_change_is_accepted(place: Workspace) -> None:
    asked = ["recipe.yaml", "run.dir=others", "tuning.unfrozen_parameters=null"]
    refused = place.train(*asked)
    assert refused.code == 64
    assert "tuning.unfrozen_parameters" in refused.said[0]
    refused = place.train(*asked, "run.accept_changes=[tuning.unfrozen_parameters]")
    assert refused.code == 64
    assert "was trained, and this run freezes it" in refused.said[0]


def test_capacity_and_evaluate_know_them(
    place: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    documents = {}
    for name, asked in (("parts", []), ("whole", ["tuning.layers=null", "tuning.unfrozen_parameters=null"])):
        assert cli(["capacity", "recipe.yaml", "--json", *asked]) == 0
        documents[name] = capsys.readouterr().out
    sizes = {name: len(raw) // 2 for name, (_, _, raw) in raw_tensors(MODEL).items()}
    trained = sum(size for name, size in sizes.items() if name.startswith(TRAINED))
    assert f'"trainable_parameters": {trained}' in documents["parts"]
    assert f'"trainable_parameters": {sum(sizes.values())}' in documents["whole"]
    assert "full tuning of parts" in documents["parts"]
    assert "of parts" not in documents["whole"]
    Path("facts.jsonl").write_text(jsonl([{"prompt": "Tom has a", "completion": " red ball"}]))
    sets = "evaluation.sets=[{path: facts.jsonl, metrics: [loss]}]"
    assert cli(["evaluate", "alone", "--against", "base", "--json", "found.json", sets]) == 0
    scores = json.loads(Path("found.json").read_text())["scores"]
    assert len({json.dumps(one) for one in scores}) == len(scores), "the result's are other than the base's"
