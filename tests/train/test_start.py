"""`tuning.start`: a run goes on from an earlier adapter, optimizer afresh, on any number of ranks, or is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.mpi import rank_environment
from train.launching import MODEL, Outcome, Workspace, curve, held_out, jsonl, raw_tensors, succeeded
from train.test_result import TRAIN, VALID

RATE, BETAS = 1e-3, (0.9, 0.95)
RECIPE = f"""\
model: {{path: {MODEL}, dtype: float32}}
tuning: {{type: lora, rank: 4, alpha: 12}}
data: {{path: rows, format: tokens, sequence_length: 64}}
batch: {{global_size: 6, micro_size: 1, cells: 3}}
optimizer: {{learning_rate: {RATE}, betas: [0.9, 0.95], clip_norm: null}}
run: {{dir: first, steps: 3, eval_every: 3}}
"""
START = "tuning.start=first"
ASKED = {
    "first": [],
    "second": [START, "run.dir=second", "run.steps=1"],
    "gated": [
        START,
        "run.dir=gated",
        "run.steps=1",
        "evaluation.stop_when={metric: eval_loss, at_most: 1000}",
    ],
}
SLOW = {
    "long": [START, "run.dir=long"],
    "of mlx-lm": ["tuning.start=bare", "run.dir=by-mlx-lm", "run.steps=1"],
    "of PEFT": ["tuning.start=first/final/peft", "run.dir=by-peft", "run.steps=1"],
    "third": ["tuning.start=second/final", "run.dir=third", "run.steps=1"],
    "dora": ["tuning.type=dora", "run.dir=dora"],
    "of dora": ["tuning.type=dora", "tuning.start=dora", "run.dir=by-dora", "run.steps=1"],
    "many": ["daughters", "recipe.yaml", "--people", "people", 'tuning.start="{person}"', "run.dir=many"],
}
DRY = {"good": [], "bad": ["tuning.rank=8"]}
ADVICE = ["gated/recipe.yaml", "tuning.start=gated", "run.dir=gated-2"]
REFUSED = {
    "tuning.start: first: has rank 4, not 8; set tuning.rank: 4": [START, "tuning.rank=8"],
    "tuning.start: first: is scaled by 3, not 2; with tuning.rslora: null set tuning.alpha: 12": [
        START,
        "tuning.alpha=8",
    ],
    "tuning.start: first: is of LoRA, the recipe asks for DoRA; change tuning.type": [
        START,
        "tuning.type=dora",
    ],
    "tuning.start: first: has model.layers.0.mlp.down_proj.lora_a as (192, 4), which is not asked for; set "
    "tuning.targets and tuning.layers as it was trained, and its base in model.path": [
        START,
        "tuning.targets=[q_proj]",
    ],
    "tuning.start: begun: this run is not finished; the command that began it goes on with it": [
        "tuning.start=begun"
    ],
    "tuning.start: nowhere: no such folder; name a finished run, or the folder of its weights": [
        "tuning.start=nowhere"
    ],
    f"tuning.start: {MODEL}: no adapter; a whole model is a base: name it in model.path": [
        f"tuning.start={MODEL}"
    ],
    "tuning.start: first: was trained on other weights than those in other; name its base in model.path, or leave "
    "tuning.start out": [START, "model.path=other"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    made = Workspace(tmp_path_factory.mktemp("start"))
    made.write("recipe.yaml", RECIPE)
    for folder in ("rows", "people/first"):
        for split, rows in (("train", TRAIN), ("valid", VALID)):
            made.write(f"{folder}/{split}.jsonl", jsonl({"tokens": tokens} for tokens in rows))
    shutil.copytree(MODEL, made.folder / "other")
    weights = made.folder / "other" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-2] ^= 1
    weights.write_bytes(raw)
    made.write("begun/recipe.yaml", RECIPE)
    (made.folder / "bare").mkdir()  # the adapter's two files alone are a folder of another tool
    for name in ("adapters.safetensors", "adapter_config.json"):
        (made.folder / "bare" / name).symlink_to(f"../first/final/{name}")
    return made


@pytest.fixture(scope="module")
def outcomes(place: Workspace) -> dict[str, Outcome]:
    """All commands, one after the other in one process."""
    words = {
        name: asked if asked[:1] == ["daughters"] else ["recipe.yaml", *asked]
        for name, asked in ASKED.items()
    }
    wrong = {said: ["recipe.yaml", "run.dir=refused", *asked] for said, asked in REFUSED.items()}
    dry = {f"dry {n}": ["recipe.yaml", "--dry-run", "run.dir=dry", START, *more] for n, more in DRY.items()}
    return place.train_many({**words, **wrong, **dry, "advice": ADVICE})[0]


@pytest.fixture(scope="module")
def more(place: Workspace, outcomes: dict[str, Outcome]) -> Workspace:
    """Every form of an earlier adapter, and the command for many."""
    words = {n: asked if asked[0] == "daughters" else ["recipe.yaml", *asked] for n, asked in SLOW.items()}
    for outcome in place.train_many(words)[0].values():
        succeeded(outcome)
    return place


def test_it_begins_where_the_earlier_one_ended(place: Workspace, outcomes: dict[str, Outcome]) -> None:
    for name in ASKED:
        succeeded(outcomes[name])
    ended = held_out(place.folder / "first")[-1][1]
    assert ended < held_out(place.folder / "first")[0][1]
    assert held_out(place.folder / "second")[0] == (0, ended)


def test_the_optimizer_begins_afresh(place: Workspace, outcomes: dict[str, Outcome]) -> None:
    """The first step of AdamW with fresh averages moves every weight that has a gradient by the learning rate."""
    before, after = (raw_tensors(place.folder / run / "final") for run in ("first", "second"))
    for tensor, (_, _, raw) in before.items():
        moved = np.abs(np.frombuffer(after[tensor][2], np.float32) - np.frombuffer(raw, np.float32))
        assert moved.max() <= RATE * 1.001, tensor
        assert np.median(moved) == pytest.approx(RATE, rel=0.01), tensor


@pytest.mark.slow
def test_in_whatever_form_it_lies_the_bits_are_the_same(more: Workspace) -> None:
    found = [raw_tensors(more.folder / run / "final") for run in ("second", "by-mlx-lm", "by-peft")]
    assert found[0] == found[1] == found[2]
    assert held_out(more.folder / "by-dora")[0][1] == held_out(more.folder / "dora")[-1][1]


@pytest.mark.slow
def test_a_daughter_begins_where_its_own_earlier_one_ended(more: Workspace) -> None:
    """By the command for many, whose products are batched in another way."""
    ended = held_out(more.folder / "first")[-1][1]
    assert held_out(more.folder / "many/first")[0][1] == pytest.approx(ended, rel=1e-5)
    losses = [[loss for _, loss, _ in curve(more.folder / run)] for run in ("many/first", "long")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_two_and_three_ranks_give_the_bits_of_one(more: Workspace) -> None:
    for ranks, stage in ((2, 3), (3, 2)):
        run = f"long-{ranks}"
        command = ["recipe.yaml", START, f"run.dir={run}", f"memory.zero_stage={stage}"]
        for outcome in more.train_many({run: command}, ranks=ranks):
            assert outcome[run].code == 0
        assert curve(more.folder / run) == curve(more.folder / "long")
        assert held_out(more.folder / run) == held_out(more.folder / "long")
        assert raw_tensors(more.folder / run / "final") == raw_tensors(more.folder / "long/final")


@pytest.mark.parametrize("said", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(said: str, outcomes: dict[str, Outcome]) -> None:
    assert outcomes[said].code == 64
    assert outcomes[said].stderr == f"mlx_empire: {said}\n"


def test_a_dry_run_says_what_a_run_would(outcomes: dict[str, Outcome], place: Workspace) -> None:
    assert outcomes["dry good"].code == 0
    assert outcomes["dry bad"].code == 64
    assert (
        outcomes["dry bad"].stderr
        == "mlx_empire: tuning.start: first: has rank 4, not 8; set tuning.rank: 4\n"
    )
    assert not (place.folder / "dry").exists()


def test_a_gate_that_the_earlier_one_passes_does_not_end_it_before_it_learnt(
    place: Workspace, outcomes: dict[str, Outcome]
) -> None:
    assert [step for step, _ in held_out(place.folder / "gated")] == [0, 1]
    assert (place.folder / "gated/final/FROZEN.json").exists()
    said = outcomes["gated"].stdout
    assert "another adapter goes on from it by tuning.start: gated" in said
    assert said.splitlines()[-1].split("#")[0].split() == ["mlx-empire", "train", *ADVICE]


def test_the_last_line_of_a_frozen_adapter_is_a_command_that_works(
    place: Workspace, outcomes: dict[str, Outcome]
) -> None:
    succeeded(outcomes["advice"])
    assert held_out(place.folder / "gated-2")[0][1] == held_out(place.folder / "gated")[-1][1]


@pytest.mark.slow
def test_the_audit_begins_from_fresh_adapters_all_the_same(
    place: Workspace, outcomes: dict[str, Outcome]
) -> None:
    found = []
    for words in ([], [START]):
        command = [sys.executable, "-m", "mlx_empire.verify", "recipe.yaml", *words, "--own", "--steps=2"]
        command += ["--seeds=1", "--json", "audit.json"]
        subprocess.run(command, cwd=place.folder, env=rank_environment(str(place.folder)), check=True)
        found.append(json.loads((place.folder / "audit.json").read_text()))
    assert found[0] == found[1]
    assert found[0]["techniques"]


def test_card_and_plan_say_where_it_comes_from(place: Workspace, outcomes: dict[str, Outcome]) -> None:
    start = json.loads((place.folder / "second/plan.json").read_text())["start"]
    assert (start["path"], start["rows_seen"], start["before"]) == ("first", 3 * 6, [])
    card = (place.folder / "second/final/README.md").read_text()
    assert f"| its digest | `{start['digest']}` |" in card
    assert "| rows seen before | 18 |\n| rows seen | 24 |" in card
    assert "Begun from" not in (place.folder / "first/final/README.md").read_text()


@pytest.mark.slow
def test_a_card_says_all_that_came_before(more: Workspace) -> None:
    start = json.loads((more.folder / "third/plan.json").read_text())["start"]
    second = json.loads((more.folder / "second/plan.json").read_text())["start"]
    assert (start["rows_seen"], start["before"]) == (24, [second["digest"]])
    assert f"| before it | `{second['digest']}` |" in (more.folder / "third/final/README.md").read_text()
    assert (
        "| rows seen before | not known how many |" in (more.folder / "by-mlx-lm/final/README.md").read_text()
    )


@pytest.mark.slow
def test_rank_0_alone_may_have_it(more: Workspace, tmp_path: Path) -> None:
    words = [more.folder / "recipe.yaml", START, "run.dir=apart", "memory.zero_stage=3"]
    ended = succeeded(more.train(*words, folders=[more.folder, tmp_path]))
    assert "weights read by rank 0" in ended.stdout
    assert curve(more.folder / "apart") == curve(more.folder / "long")
    assert raw_tensors(more.folder / "apart/final") == raw_tensors(more.folder / "long/final")


@pytest.fixture
def killed(more: Workspace) -> Iterator[str]:
    """A run from `first` that was killed after a save; by then `first` is gone."""
    command = [
        sys.executable,
        "-m",
        "mlx_empire.train",
        "recipe.yaml",
        START,
        "run.dir=killed",
        "run.save_every=1",
    ]
    environment = rank_environment(str(more.folder))
    fault = {"MLX_EMPIRE_FAULT": "step=3;phase=forward;action=kill"}
    ended = subprocess.run(command, cwd=more.folder, env={**environment, **fault}, capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    (more.folder / "first").rename(more.folder / "moved")
    yield "killed"
    (more.folder / "moved").rename(more.folder / "first")


@pytest.mark.faults
def test_it_resumes_to_the_same_bits_without_the_earlier_one(more: Workspace, killed: str) -> None:
    again = succeeded(more.train("recipe.yaml", START, "run.dir=killed", "run.save_every=1"))
    assert "going on after step " in again.stdout
    assert curve(more.folder / killed) == curve(more.folder / "long")
    assert raw_tensors(more.folder / killed / "final") == raw_tensors(more.folder / "long/final")
    told = [json.loads((more.folder / run / "plan.json").read_text())["start"] for run in (killed, "long")]
    assert told[0] == told[1]
