"""Continuous mode by the command: new rows begin a next generation, which replaces the one in use if it is better.

What is decided, and what a kill between any two moments leaves, tests/daughters/test_generations.py holds every day.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from train.launching import MODEL, Workspace, curve, held_out, jsonl, raw_tensors, succeeded
from train.people import command, hostfile, run, worker
from train.test_result import TRAIN, VALID

from mlx_empire.daughters.generations import Decision, Generations

RECIPE = f"""\
model: {{path: {MODEL}, dtype: float32}}
tuning: {{type: lora, rank: 4}}
data: {{path: people, format: tokens, sequence_length: 64}}
batch: {{global_size: 2, micro_size: 1}}
optimizer: {{learning_rate: 5.0e-3}}
daughters: {{replay: 0.5}}
run: {{dir: runs, steps: 4, save_every: 1}}
"""
WATCH = ("--watch", "--once")
OLD, NEW = TRAIN[:4], TRAIN[4:6]


def give(place: Workspace, people: str, name: str, rows: list[list[int]], valid: list[list[int]]) -> None:
    for split, own in (("train", rows), ("valid", valid)):
        place.write(f"{people}/{name}/{split}.jsonl", jsonl({"tokens": tokens} for tokens in own))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Rounds in one process: before there is anything, with new rows for one of two, and with rows that make it worse:
    what is held out by then is what it learnt first, and what it is to learn is another text. Last, on another base.
    """
    made = Workspace(tmp_path_factory.mktemp("watch"))
    made.write("recipe.yaml", RECIPE)
    for people in ("week-1", "week-2", "week-3"):
        give(made, people, "bert", TRAIN[2:5], VALID)
    give(made, "week-1", "anna", OLD, VALID)
    give(made, "week-2", "anna", [*OLD, *NEW], NEW)
    give(made, "week-3", "anna", [*OLD, *NEW, [7] * 40], [*OLD, *NEW])
    common = ["daughters", "recipe.yaml"]
    commands = {week: [*common, "--people", week, *WATCH] for week in ("week-1", "week-2", "week-3")}
    commands["week-3 again"] = commands["week-3"]
    worse = ["daughters.replay=0", "optimizer.learning_rate=0.05"]
    commands["week-3"] = [*commands["week-3"], *worse]
    commands["week-3 again"] = [*commands["week-3 again"], *worse]
    give(made, "week-4", "bert", TRAIN[1:5], VALID)
    write_other_base(made.folder / "base")
    commands["week-4"] = [*common, "--people", "week-4", *WATCH, "model.path=base"]
    start = ["recipe.yaml", "data.path=runs/anna/generations/2/rows", "tuning.start=runs/anna/final"]
    commands["alone"] = [*start, "run.dir=alone", "run.eval_every=4"]
    outcomes = made.train_many(commands)[0]
    for name, outcome in outcomes.items():
        succeeded(outcome)
        made.write(f"{name}.txt", outcome.stdout)
    return made


def write_other_base(folder: Path) -> None:
    """The same model but for a bit of its weights."""
    shutil.copytree(MODEL, folder)
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-2] ^= 1
    (folder / "model.safetensors").write_bytes(raw)


def said(place: Workspace, week: str) -> dict[str, list[dict[str, object]]]:
    """By name, what the worker told of it."""
    found: dict[str, list[dict[str, object]]] = {}
    for line in (place.folder / f"{week}.txt").read_text().splitlines():
        if line.startswith("@daughter "):
            event = json.loads(line.removeprefix("@daughter "))
            found.setdefault(event["name"], []).append(event)
    return found


def decision(place: Workspace, number: int) -> Decision:
    found = Generations(place.folder / "runs/anna").decision(number)
    assert found is not None
    return found


@pytest.mark.slow
def test_new_rows_begin_a_generation_from_the_one_in_use(place: Workspace) -> None:
    assert set(said(place, "week-2")) == {"anna"}, "nobody else is touched"
    second = place.folder / "runs/anna/generations/2"
    learnt = [json.loads(line)["tokens"] for line in (second / "rows/train.jsonl").read_text().splitlines()]
    assert [row for row in learnt if row in NEW] == NEW
    assert all(row in (*OLD, *NEW) for row in learnt)
    start = json.loads((second / "plan.json").read_text())["start"]
    assert (start["path"], start["rows_seen"]) == ("runs/anna/final", 4 * 2)
    assert "| rows seen | 16 |" in (second / "final/README.md").read_text()
    # The evaluation before its first step is that of the first generation, whatever is held out by now.
    before, after = [loss for _, loss in held_out(second)]
    assert after < before
    found = decision(place, 2)
    assert (found.promoted, found.begun_from) == (True, 1)
    assert found.scores["eval_loss"] == [before, after]
    assert said(place, "week-2")["anna"][-1]["note"] == f"generation 2 is in use: {found.why}"


@pytest.mark.slow
def test_it_is_what_the_command_for_one_makes_of_the_same_start(place: Workspace) -> None:
    second, alone = place.folder / "runs/anna/generations/2", place.folder / "alone"
    assert [loss for _, loss, _ in curve(second)] == pytest.approx([x for _, x, _ in curve(alone)], rel=1e-4)
    assert [x for _, x in held_out(second)] == pytest.approx([x for _, x in held_out(alone)], rel=1e-4)


@pytest.mark.slow
def test_a_worse_one_is_kept_and_the_one_before_stays_in_use(place: Workspace) -> None:
    found = decision(place, 3)
    assert not found.promoted
    assert found.scores["eval_loss"][1] > found.scores["eval_loss"][0]
    assert (place.folder / "runs/anna/generations/3/final/adapters.safetensors").exists()
    assert os.readlink(place.folder / "runs/anna/current") == "generations/2/final"
    assert raw_tensors(place.folder / "runs/anna/current") != raw_tensors(place.folder / "runs/anna/final")
    again = said(place, "week-3 again")
    assert "anna" not in again, "the same rows are not tried again"
    assert [told["state"] for told in again["bert"]] == ["changed"], (
        "who has no new rows learnt at another rate"
    )


@pytest.mark.slow
def test_on_another_base_nothing_goes_on_and_it_is_said(place: Workspace) -> None:
    told = {
        "name": "bert",
        "state": "changed",
        "note": "base holds other weights than generation 1 was trained on",
    }
    assert said(place, "week-4") == {"bert": [told]}
    assert Generations(place.folder / "runs/bert").numbers == [1]


@pytest.mark.slow
def test_one_command_shows_it_and_another_goes_back(place: Workspace, tmp_path: Path) -> None:
    shutil.copytree(place.folder, tmp_path / "copy", symlinks=True)
    copy = Workspace(tmp_path / "copy")
    shutil.copytree(copy.folder / "week-3", copy.folder / "people")
    told = run(copy, "--rollback", "anna", "--pin", "anna")
    assert told.code == 0, told.stderr
    assert [line.split(":")[1] for line in told.stdout.splitlines()] == [
        " generation 1 (in use, pinned)",
        " generation 2",
        " generation 3",
    ]
    # Without --watch what the generations were offered is no change, and what comes next names the one in use.
    same = ["optimizer.learning_rate=0.05", "run.accept_changes=[optimizer.learning_rate]"]
    plain = run(copy, *same)
    assert plain.code == 0, plain.stdout
    assert "--adapter-path runs/anna/current" in plain.stdout


@pytest.mark.slow
def test_another_base_is_never_passed_off_as_the_same(place: Workspace, tmp_path: Path) -> None:
    copy = Workspace(tmp_path / "copy")
    shutil.copytree(place.folder, copy.folder, symlinks=True)
    shutil.copytree(copy.folder / "week-1", copy.folder / "people")
    give(copy, "people", "bert", TRAIN[1:5], VALID)
    for words in ((), WATCH):
        told = run(copy, *words, "model.path=base")
        assert told.code == 65
        assert "bert: changed: " in told.stdout
        assert "base holds other weights" in told.stdout
    assert Generations(copy.folder / "runs/bert").numbers == [1]


@pytest.mark.faults
@pytest.mark.parametrize(
    "fault",
    [
        "phase=prepare",
        "step=2;phase=forward",
        "step=3;phase=save-rename",
        "phase=finish",
        "phase=decide",
        "phase=promote",
    ],
)
def test_killed_anywhere_it_comes_to_the_same_generation(
    fault: str, place: Workspace, tmp_path: Path
) -> None:
    copy = Workspace(tmp_path)
    copy.write("recipe.yaml", RECIPE)
    shutil.copytree(place.folder / "week-2", copy.folder / "people")
    for name in ("anna", "bert"):
        kept = shutil.ignore_patterns("generations", "current")
        shutil.copytree(place.folder / "runs" / name, copy.folder / "runs" / name, ignore=kept)
    struck = worker(copy, *WATCH, fault=f"{fault};action=kill")
    assert struck.code == -signal.SIGKILL
    used = copy.folder / "runs/anna/current"
    assert (used / "adapters.safetensors").exists(), "what is in use is whole at any moment"
    succeeded(worker(copy, *WATCH))
    second, whole = (one.folder / "runs/anna/generations/2" for one in (copy, place))
    assert curve(second) == curve(whole)
    assert held_out(second) == held_out(whole)
    assert raw_tensors(used) == raw_tensors(whole / "final")
    assert (second / "DECISION.json").read_bytes() == (whole / "DECISION.json").read_bytes()
    assert not list((copy.folder / "runs").rglob(".*"))


@pytest.mark.faults
def test_two_workers_share_out_who_has_new_rows(place: Workspace, tmp_path: Path) -> None:
    """Under mpirun, on one disk: each next generation is begun once, and trained by one of them."""
    copy = Workspace(tmp_path)
    copy.write("recipe.yaml", RECIPE)
    for name, rows in (("anna", [*OLD, *NEW]), ("bert", TRAIN[:5])):
        give(copy, "people", name, rows, NEW)
        kept = shutil.ignore_patterns("generations", "current")
        shutil.copytree(place.folder / "runs" / name, copy.folder / "runs" / name, ignore=kept)
    told = run(copy, "--hosts", hostfile(copy, 1 << 30, slots=2), *WATCH)
    assert told.code == 0, told.stderr
    assert told.stdout.count("1 of 2 daughters") == 2
    for name in ("anna", "bert"):
        own = Generations(copy.folder / "runs" / name)
        assert (own.numbers, own.unfinished) == ([1, 2], None)
        found = own.decision(2)
        assert found is not None
        assert own.current == (2 if found.promoted else 1)
    assert curve(copy.folder / "runs/anna/generations/2") == curve(place.folder / "runs/anna/generations/2")


@pytest.mark.faults
def test_it_watches_until_it_is_stopped(place: Workspace, tmp_path: Path) -> None:
    """The command as it is typed: it does nothing while nothing is new, and ends by Ctrl-C with nothing left behind."""
    copy = Workspace(tmp_path)
    copy.write("recipe.yaml", RECIPE)
    shutil.copytree(place.folder / "week-1", copy.folder / "people")
    line, environment = command(copy, "--watch", "--every", "0.2")
    output = copy.folder / "output.txt"
    with output.open("w") as file:
        process = subprocess.Popen(line, cwd=copy.folder, env=environment, stdout=file, stderr=file)
        try:
            wait_for(lambda: "watching people" in output.read_text())
            assert os.readlink(copy.folder / "runs/anna/current") == "final"
            give(copy, "people", "anna", [*OLD, *NEW], NEW)
            give(copy, "people", "carl", OLD[:2], VALID)
            wait_for(lambda: output.read_text().count("watching people") >= 2)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
    assert os.readlink(copy.folder / "runs/anna/current") == "generations/2/final"
    assert raw_tensors(copy.folder / "runs/carl/current")
    assert "Traceback" not in output.read_text()


def wait_for(happened: object) -> None:
    deadline = time.monotonic() + 180
    assert callable(happened)
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)
