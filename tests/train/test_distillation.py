"""Runs with a teacher, by the command that a user types: what is kept of it, what rows find, bits on any ranks, resume.

The teacher is the tests' small model with noise on its weights. What is kept is compared with mlx-lm's own model, whole
and in float32, and numpy's softmax in float64; the first step's loss with the formula in float64 (`engine`).
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from engine.test_distillation import in_float64, log_softmax
from mlx_lm.utils import load_model
from train.launching import (
    MODEL,
    RECIPE,
    Outcome,
    Workspace,
    curve,
    held_out,
    jsonl,
    raw_tensors,
    step_records,
    succeeded,
)

from mlx_empire.data.splits import load_splits
from mlx_empire.model.distillation import Distillation
from mlx_empire.recipe.load import load_recipe
from mlx_empire.run.job import Job

HOW = Distillation(weight=0.7, temperature=1.5, top=6)
DATA = ("data.path=asked", "data.format=completions")
TAUGHT = (
    "recipe.yaml",
    *DATA,
    "run.steps=4",
    "run.eval_every=4",
    "distillation.teacher=teacher",
    f"distillation.weight={HOW.weight}",
    f"distillation.temperature={HOW.temperature}",
    f"distillation.top={HOW.top}",
)
ASKED = "is asked once about"


@contextmanager
def cache(folder: Path | str):
    """The token cache lies there."""
    before = os.environ["MLX_EMPIRE_CACHE"]
    os.environ["MLX_EMPIRE_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ["MLX_EMPIRE_CACHE"] = before


def teacher_of(folder: Path, seed: int) -> None:
    """The small model with noise on its weights."""
    shutil.copytree(MODEL, folder)
    rng = np.random.default_rng(seed)
    weights = {
        name: (np.array(array) + 0.02 * rng.normal(size=array.shape)).astype(np.float32)
        for name, array in mx.load(str(MODEL / "model.safetensors")).items()
    }
    (folder / "model.safetensors").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), {n: mx.array(w) for n, w in weights.items()})


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workspace:
    """Twenty questions with answers of several lengths, and three models to learn from."""
    made = Workspace(tmp_path_factory.mktemp("distillation"))
    made.write("recipe.yaml", RECIPE)
    said = "the king and the queen went out to see what the old man had to say about the sea"
    words = said.split()
    rows = [
        {"prompt": " ".join(words[: 2 + n % 5]), "completion": " ".join(words[n % 7 : n % 7 + 3 + n % 4])}
        for n in range(20)
    ]
    made.write("asked/train.jsonl", jsonl(rows))
    made.write("asked/valid.jsonl", jsonl(rows[3:6]))
    teacher_of(made.folder / "teacher", 1)
    shutil.copytree(made.folder / "teacher", made.folder / "same")
    teacher_of(made.folder / "changed", 2)
    foreign = made.folder / "foreign"
    shutil.copytree(MODEL, foreign)
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    return made


COMMANDS = {
    "alone": (*TAUGHT, "run.dir=alone", "run.save_every=2"),
    "packed": (*TAUGHT, "run.dir=packed", "data.packing=true"),
    "lora": (*TAUGHT, "run.dir=lora", "run.seed=1", "tuning.type=lora", "data.packing=true"),
    "ternary": (
        *TAUGHT,
        "run.dir=ternary",
        "run.seed=1",
        "tuning.qat=ternary",
        "memory.gradient_checkpointing=true",
    ),
    "foreign": (*TAUGHT, "run.dir=a", "distillation.teacher=foreign"),
    "nobody": (*TAUGHT, "run.dir=b", "distillation.teacher=nowhere"),
    "too many": (*TAUGHT, "run.dir=c", "distillation.top=512"),
}
REFUSED = {
    "foreign": "distillation.teacher: foreign: its tokenizer has other tokens than that of ",
    "nobody": "nowhere/config.json",
    "too many": "distillation.top: 512: must lie below the vocabulary's size, 512",
}
SPREAD = {
    2: ("memory.zero_stage=3", "memory.shares=[2,1]", "memory.gradient_checkpointing=true"),
    3: ("memory.zero_stage=1", "memory.shares=[1,3,2]"),
}


@pytest.fixture(scope="module")
def runs(place: Workspace) -> dict[str, Outcome]:
    with cache("cache"):
        return place.train_many(COMMANDS)[0]


def entries(place: Workspace, runs: dict[str, Outcome]) -> list[Path]:
    """The folders of what is kept of the teacher for the plain rows and for the packed ones, as runs named them."""
    lines = [line for name in ("alone", "packed") for line in runs[name].stdout.splitlines() if ASKED in line]
    return [place.folder / line.rsplit(" in ", 1)[1] for line in lines]


def rows_of(place: Workspace, *, packing: bool):
    with cache(place.folder / "cache"):
        return load_splits(
            path=place.folder / "asked",
            format="completions",
            sequence_length=64,
            packing=packing,
            tokenizer_folder=MODEL,
            vocab_size=512,
        ).train


def whole_model(folder: Path):
    model = load_model(folder, lazy=True)[0]
    model.apply(lambda array: array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array)
    return model


def values_of(model, rows) -> tuple[np.ndarray, np.ndarray]:
    """By target that counts its logarithms at the temperature (targets, vocabulary), each document alone."""
    found = []
    for row in (rows.row(index) for index in range(len(rows))):
        for document in np.unique(row.documents):
            here = row.documents == document
            logits = np.array(model(mx.array(row.inputs[here])[None])[0]).astype(np.float64)
            found.append(log_softmax(logits / HOW.temperature)[row.mask[here] != 0])
    return np.concatenate(found)


@pytest.mark.parametrize("packing", [False, True])
def test_what_is_kept_is_mlx_lms_softmax_of_every_target(place, runs, packing):
    succeeded(runs["packed" if packing else "alone"])
    folder = entries(place, runs)[packing]
    logs = values_of(whole_model(place.folder / "teacher"), rows_of(place, packing=packing))
    ids = np.fromfile(folder / "ids.bin", "<i4").reshape(-1, HOW.top)
    kept = np.fromfile(folder / "logs.bin", "<f2").reshape(-1, HOW.top + 1).astype(np.float64)
    assert len(ids) == len(logs) > 100
    order = np.argsort(-logs, axis=-1)
    assert (ids == order[:, : HOW.top]).mean() > 0.99  # two that are alike may change places
    np.testing.assert_allclose(kept[:, :-1], np.take_along_axis(logs, ids, -1), rtol=1e-3, atol=1e-3)
    rest = np.log(np.exp(np.take_along_axis(logs, order[:, HOW.top :], -1)).sum(axis=-1))
    np.testing.assert_allclose(kept[:, -1], rest, rtol=1e-3, atol=2e-3)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}


def test_a_step_learns_from_its_own_rows_values(place, runs):
    """The first step's two losses, of shuffled rows, in float64 of mlx-lm's logits and of what is kept."""
    succeeded(runs["alone"])
    rows, folder = rows_of(place, packing=False), entries(place, runs)[0]
    ids = np.fromfile(folder / "ids.bin", "<i4").reshape(-1, HOW.top)
    kept = np.fromfile(folder / "logs.bin", "<f2").reshape(-1, HOW.top + 1)
    first = np.concatenate([[0], np.cumsum(rows.targets_per_row)])
    job, model = Job.of(load_recipe(place.folder / "alone" / "recipe.yaml"), rows), whole_model(MODEL)
    parts = np.zeros(2)
    for batch in job.batches(1):
        for number in batch.rows_read:
            row, own = rows.row(number), slice(first[number], first[number + 1])
            counted = row.mask != 0
            logits = np.array(model(mx.array(row.inputs)[None]))[:, counted]
            asked = row.targets[counted][None], np.ones((1, counted.sum())), job.targets(1)
            ce, kl, _ = in_float64(logits, *asked, HOW, ids[own][None], kept[own][None])
            parts += ce[0], kl[0]
    record = step_records(place.folder / "alone")[0]
    assert record["cross_entropy"] == pytest.approx(parts[0], rel=1e-5)
    assert record["divergence"] == pytest.approx(parts[1], rel=1e-4)
    assert record["loss"] == HOW.mixed(record["cross_entropy"], record["divergence"])
    assert record["divergence"] > 0.01


def test_a_teacher_is_asked_once_for_all_runs_on_the_same_rows(place, runs):
    asks = {name: ASKED in runs[name].stdout for name in ("alone", "packed", "lora", "ternary")}
    assert asks == {"alone": True, "packed": True, "lora": False, "ternary": False}
    kept = (place.folder / "cache" / "teachers").glob("[!.]*")
    assert sorted(kept) == sorted(entries(place, runs))
    for name in asks:
        succeeded(runs[name])
        assert all({"cross_entropy", "divergence"} <= one.keys() for one in step_records(place.folder / name))
    card = (place.folder / "alone" / "final" / "README.md").read_text()
    assert "| teacher | `teacher`, weight 0.7, temperature 1.5, 6 tokens |" in card


@pytest.mark.parametrize("name", REFUSED)
def test_who_cannot_teach_is_refused_in_a_line(runs, name):
    assert runs[name].code == 64
    assert REFUSED[name] in runs[name].stderr


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_bits_are_the_same_on_any_number_of_ranks(place, runs, ranks):
    """Values that these ranks ask for themselves, and all that is learnt from them."""
    succeeded(runs["alone"])
    commands = {
        "plain": (*TAUGHT, f"run.dir=plain-{ranks}", *SPREAD[ranks]),
        "packed": (*TAUGHT, f"run.dir=packed-{ranks}", "data.packing=true", *SPREAD[ranks]),
    }
    with cache(f"cache-{ranks}"):
        ended = place.train_many(commands, ranks)
    for name, other in (("plain", "alone"), ("packed", "packed")):
        succeeded(ended[0][name])
        assert ASKED in ended[0][name].stdout
        run = place.folder / f"{name}-{ranks}"
        assert curve(run) == curve(place.folder / other)
        assert held_out(run) == held_out(place.folder / other)
        assert raw_tensors(run / "final") == raw_tensors(place.folder / other / "final")
    files = [sorted((place.folder / one).glob("teachers/*/*.bin")) for one in ("cache", f"cache-{ranks}")]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


def test_a_run_goes_on_with_the_same_teacher_alone(place, runs):
    """What is damaged, or half made, is asked for again; another teacher is another run."""
    succeeded(runs["alone"])
    for name in ("on", "elsewhere", "changed"):
        again = place.folder / f"alone-{name}"
        shutil.copytree(place.folder / "alone", again)
        shutil.rmtree(again / "final")
        shutil.rmtree(again / "checkpoints" / "step-000004")
        (again / "COMPLETE").unlink()
    folder = entries(place, runs)[0]
    raw = bytearray((folder / "logs.bin").read_bytes())
    raw[7] ^= 1
    (folder / "logs.bin").write_bytes(raw)
    half = folder.parent / ".building-half.d"
    half.mkdir()
    (half / "ids.bin").write_bytes(b"half")
    half.with_suffix(".lock").touch()
    commands = {
        name: (*TAUGHT, f"run.dir=alone-{name}", "run.save_every=2", f"distillation.teacher={teacher}")
        for name, teacher in (("on", "teacher"), ("elsewhere", "same"), ("changed", "changed"))
    }
    with cache("cache"):
        (ended,) = place.train_many(commands)
    assert ASKED in succeeded(ended["on"]).stdout
    assert ASKED not in succeeded(ended["elsewhere"]).stdout
    assert not half.exists()
    for name in ("on", "elsewhere"):
        run = place.folder / f"alone-{name}"
        assert curve(run) == curve(place.folder / "alone")
        assert raw_tensors(run / "final") == raw_tensors(place.folder / "alone" / "final")
    assert ended["changed"].code == 64
    assert "distillation.teacher" in ended["changed"].stderr


def test_a_machine_without_the_values_gets_them_from_one_that_has_them(place, runs, tmp_path):
    succeeded(runs["alone"])
    other = tmp_path / "other"
    for folder in (other, tmp_path / "king"):
        folder.mkdir()
        for name in ("recipe.yaml", "asked", "teacher"):
            (folder / name).symlink_to(place.folder / name)
    shutil.copytree(place.folder / "cache", tmp_path / "king" / "cache")
    with cache("cache"):
        ended = place.train(*TAUGHT, "run.dir=run", folders=[tmp_path / "king", other])
    assert ASKED not in succeeded(ended).stdout
    assert curve(tmp_path / "king" / "run") == curve(place.folder / "alone")
    (got,) = other.glob("cache/teachers/*/logs.bin")
    assert got.read_bytes() == (tmp_path / "king" / got.relative_to(other)).read_bytes()
