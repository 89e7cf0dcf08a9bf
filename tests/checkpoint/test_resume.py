"""What a continued run must find as it was: data, frozen weights; and where it looks for checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mlx_empire.checkpoint.identity import base_digest
from mlx_empire.checkpoint.manifest import Manifest, Resolved, digest_of
from mlx_empire.checkpoint.resume import Start, find_start, folder_of, require_same, require_steps_left
from mlx_empire.checkpoint.survey import Found
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.errors import UserError
from mlx_empire.recipe.load import parse_recipe
from mlx_empire.recipe.schema import Recipe

MODEL = Path(__file__).resolve().parents[1] / "fixtures" / "tiny-llama-260k"
TEXT = """\
model: {path: m}
data: {path: d, sequence_length: 8}
batch: {global_size: 4}
optimizer: {learning_rate: 1e-3}
run: {dir: r, steps: 10}
"""
COMM = SoloCommunicator("king.local")


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(TEXT, "x.yaml", overrides)


def start(*overrides: str) -> Start:
    manifest = Manifest(
        format=1,
        step=7,
        written_by={},
        recipe=TEXT,
        recipe_digest=digest_of(TEXT.encode()),
        data_digest="rows",
        next_row=28,
        seed=0,
        base="base",
        resolved=Resolved(cells=2, gradient_dtype="float32"),
        numerics={},
        zero_stage=3,
        shares=(1.0,),
        shards=(),
    )
    return Start(recipe(*overrides), Found(Path("c/step-000007"), manifest, (), ()), ())


def test_data_and_base_must_be_the_same() -> None:
    require_same(start(), recipe(), "rows", "base")
    with pytest.raises(UserError, match=r"data\.path: d holds other rows"):
        require_same(start(), recipe(), "others", "base")
    with pytest.raises(UserError, match=r"model\.path: m holds other weights"):
        require_same(start(), recipe(), "rows", "another")
    accepted = recipe("run.accept_changes=[data.path,model.path]")
    require_same(start(), accepted, "others", "another")
    require_same(Start(recipe(), None, ()), recipe(), "others", "another")


def test_a_run_that_is_shorter_than_its_checkpoint_is_refused() -> None:
    require_steps_left(start(), 7)
    with pytest.raises(UserError, match=r"run\.steps: 6: .* is of step 7 already"):
        require_steps_left(start(), 6)


def test_a_base_is_known_by_its_bytes(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(MODEL, copy)
    assert base_digest(copy) == base_digest(MODEL)
    weights = copy / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1 - len(raw) // 128] ^= 1  # inside the last sample
    weights.write_bytes(bytes(raw))
    assert base_digest(copy) != base_digest(MODEL)


def test_every_node_may_keep_its_checkpoints_where_it_likes() -> None:
    assert folder_of(recipe(), COMM) == Path("r/checkpoints")
    assert folder_of(recipe("run.checkpoints=/disk/{host}-{rank}"), COMM) == Path("/disk/king.local-0")


def test_a_run_without_checkpoints_begins_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for resume in ("auto", "never"):
        assert find_start(COMM, recipe(f"run.resume={resume}")).step == 0
    with pytest.raises(UserError, match=r"r/checkpoints has no checkpoint of step 3; there are: none"):
        find_start(COMM, recipe("run.resume=3"))
    with pytest.raises(UserError, match=r"run\.resume: a/b: expected auto, never, a step, or the path"):
        find_start(COMM, recipe("run.resume=a/b"))
    assert list(tmp_path.iterdir()) == []
