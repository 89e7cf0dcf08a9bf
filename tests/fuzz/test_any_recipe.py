"""Any recipe at all: the same bits on one, two and three ranks and after a stop, and a result that others open with the
loss that was reported. What cannot be done is refused in one line, everywhere alike.

`MLX_EMPIRE_FUZZ_EXAMPLES` sets how many recipes are drawn (a fiftieth of it), `MLX_EMPIRE_FUZZ_SEED` which.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import pytest
from mlx_lm.utils import save_model
from support.random_recipes import FAMILIES, drawn, spread
from support.tiny_models import tiny_config, tiny_model
from train.launching import Outcome, Workspace, curve, held_out, jsonl, raw_tensors
from train.test_result import mean_loss

COUNT = int(os.environ.get("MLX_EMPIRE_FUZZ_EXAMPLES", "150")) // 50
SEED = int(os.environ.get("MLX_EMPIRE_FUZZ_SEED", "11"))
RECIPE = """\
model: {path: llama}
data: {path: rows, format: tokens, sequence_length: 48}
batch: {global_size: 4}
optimizer: {learning_rate: 1.0e-3}
run: {dir: run, steps: 4, save_every: 2, eval_every: 4}
"""
REFUSED = 64
NAMES = [f"recipe {i}" for i in range(COUNT)]


def rows(seed: int, count: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(1, 250) for _ in range(chance.choice((5, 17, 49, 90)))] for _ in range(count)]


VALID = rows(2, 5)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Each recipe alone, on two and on three ranks; and the last two steps of it once more, on two."""
    made = Workspace(tmp_path_factory.mktemp("any"))
    made.write("recipe.yaml", RECIPE)
    for name, data in (("train", rows(1, 11)), ("valid", VALID)):
        made.write(f"rows/{name}.jsonl", jsonl({"tokens": tokens} for tokens in data))
    for family in FAMILIES:
        mx.random.seed(SEED)
        save_model(made.folder / family, tiny_model(family)[0]())
        made.write(f"{family}/config.json", json.dumps(tiny_config(family)))
    return made


@pytest.fixture(scope="module")
def ended(place: Workspace) -> Mapping[int, Mapping[str, Outcome]]:
    """What came of each recipe, by ranks; 0 for the halves."""
    recipes, chance = dict(zip(NAMES, drawn(SEED, COUNT), strict=True)), random.Random(SEED)
    found = {}
    for ranks in (1, 2, 3):
        commands = {
            name: [
                "recipe.yaml",
                *asked,
                *(spread(chance, ranks) if ranks > 1 else []),
                f"run.dir={ranks}/{name}",
            ]
            for name, asked in recipes.items()
        }
        found[ranks] = place.train_many(commands, ranks=ranks if ranks > 1 else 0)[0]
    halves = {}
    for name, asked in recipes.items():
        if found[1][name].code == 0:
            shutil.copytree(place.folder / "1" / name, place.folder / "0" / name)
            for left in ("final", "checkpoints/step-000004"):
                shutil.rmtree(place.folder / "0" / name / left)
            (place.folder / "0" / name / "COMPLETE").unlink()
            halves[name] = ["recipe.yaml", *asked, *spread(chance, 2, anew=False), f"run.dir=0/{name}"]
    found[0] = place.train_many(halves, ranks=2)[0]
    return found


def told(place: Workspace, name: str) -> str:
    return f"{name}: {' '.join(dict(zip(NAMES, drawn(SEED, COUNT), strict=True))[name])}"


def result(run: Path) -> tuple[Any, ...]:
    return curve(run), held_out(run)[-1:], raw_tensors(run / "final")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_done_or_refused_in_one_line(name: str, place: Workspace, ended: Any) -> None:
    alone = ended[1][name]
    assert alone.code in (0, REFUSED), told(place, name) + alone.stderr[-3000:]
    for ranks in (1, 2, 3):
        outcome = ended[ranks][name]
        assert outcome.code == alone.code, told(place, name) + outcome.stderr[-3000:]
        if alone.code:
            assert "Traceback" not in outcome.stderr, told(place, name)
            assert len(outcome.said) == 1, told(place, name)


def test_most_of_what_is_drawn_can_be_trained(ended: Any) -> None:
    """So that what is skipped below is not all there is."""
    assert 2 * sum(outcome.code == 0 for outcome in ended[1].values()) > COUNT


@pytest.mark.parametrize("ranks", [2, 3, 0])
@pytest.mark.parametrize("name", NAMES)
def test_the_bits_do_not_depend_on_the_machines(name: str, ranks: int, place: Workspace, ended: Any) -> None:
    if ended[1][name].code:
        pytest.skip("refused")
    assert ended[ranks][name].code == 0, told(place, name) + ended[ranks][name].stderr[-3000:]
    assert result(place.folder / str(ranks) / name) == result(place.folder / "1" / name), told(place, name)


@pytest.mark.parametrize("name", NAMES)
def test_others_open_the_result_with_the_loss_that_was_told(name: str, place: Workspace, ended: Any) -> None:
    """By mlx-lm, which knows nothing of what trained it."""
    if ended[1][name].code:
        pytest.skip("refused")
    asked = dict(word.split("=", 1) for word in dict(zip(NAMES, drawn(SEED, COUNT), strict=True))[name])
    if "tuning.bits" in asked or "tuning.qat" in asked or asked["model.path"] == "falcon":
        pytest.skip("mlx-lm opens no base that is packed while it is loaded, and no falcon")
    run = place.folder / "1" / name
    if asked["tuning.type"] == "full":
        model, _ = mlx_lm.utils.load_model(run / "final")
    else:
        model, _ = mlx_lm.utils.load_model(place.folder / asked["model.path"])
        model.set_dtype(getattr(mx, asked["model.dtype"]))
        mlx_lm.utils.load_adapters(model, str(run / "final"))
    model.eval()
    length = int(asked["data.sequence_length"])
    cut = [tokens[a : a + length + 1] for tokens in VALID for a in range(0, len(tokens) - 1, length)]
    tolerance = 1e-4 if asked["model.dtype"] == "float32" else 2e-2
    assert mean_loss(model, cut) == pytest.approx(held_out(run)[-1][1], rel=tolerance), told(place, name)
