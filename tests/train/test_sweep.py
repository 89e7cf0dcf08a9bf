"""`mlx-empire sweep`: settings over one base; who comes to the end has the bits of a run alone; kills, refusals."""

from __future__ import annotations

import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from support.mpi import rank_environment
from train import people
from train.launching import Outcome, Workspace, curve, held_out, jsonl, metrics, raw_tensors, succeeded
from train.people import started
from train.test_result import TRAIN, VALID

RECIPE = people.RECIPE.replace("path: people", "path: rows").replace(
    "dir: runs, steps: 6, eval_every: 3", "dir: swept, steps: 8"
)
SWEPT = ("learning_rate=1e-4,2e-2,5.0e-3", "rank=2,4", "--keep", "2")
NAMES = [f"learning_rate={rate},rank={rank}" for rate in ("1e-4", "2e-2", "5.0e-3") for rank in (2, 4)]


THREE = ("learning_rate=1e-4,2e-2,5.0e-3", "--keep", "2")


def with_rows(folder: Path) -> Workspace:
    made = Workspace(folder)
    made.write("recipe.yaml", RECIPE)
    for split, rows in (("train", TRAIN), ("valid", VALID)):
        made.write(f"rows/{split}.jsonl", jsonl({"tokens": tokens} for tokens in rows))
    return made


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    return with_rows(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    made = with_rows(tmp_path_factory.mktemp("whole"))
    succeeded(sweep(made, *THREE))
    return made


def sweep(place: Workspace, *words: object, fault: str = "") -> Outcome:
    line = [sys.executable, "-m", "mlx_empire", "sweep", "recipe.yaml", *map(str, words)]
    return started(place, line, {**rank_environment(str(place.folder)), "MLX_EMPIRE_FAULT": fault})


def found_in(place: Workspace) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((place.folder / "swept/sweep.json").read_text())
    return told


def halved(scores: dict[str, dict[int, float]], rungs: list[tuple[int, int]]) -> dict[str, int]:
    """By hand: the last step of each setting, where the best of those that are left go on."""
    left, last = list(scores), dict.fromkeys(scores, rungs[-1][0])
    for step, go_on in rungs[:-1]:
        ranked = sorted(left, key=lambda name: scores[name][step])
        last |= dict.fromkeys(ranked[go_on:], step)
        left = ranked[:go_on]
    return last


@pytest.mark.slow
def test_the_best_come_to_the_end_with_the_bits_that_they_have_alone(place: Workspace) -> None:
    said = succeeded(sweep(place, *SWEPT)).stdout
    told = found_in(place)
    rungs = [(one["step"], one["go_on"]) for one in told["rungs"]]
    assert rungs == [(2, 3), (4, 2), (8, 2)]
    assert [one["name"] for one in told["settings"]] == NAMES
    scores: dict[str, dict[int, float]] = {}
    for one in told["settings"]:  # every one alone, to the end
        words = [f"optimizer.{one['name'].split(',')[0]}", f"tuning.{one['name'].split(',')[1]}"]
        alone = place.folder / f"alone-{one['name']}"
        recipe = ["recipe.yaml", *words, f"run.dir={alone.name}", "run.eval_every=2"]
        succeeded(place.train(*recipe))
        scores[one["name"]] = dict(held_out(alone))
    last = halved(scores, rungs)
    for one in told["settings"]:
        folder = place.folder / "swept" / one["name"]
        assert max(map(int, one["scores"])) == last[one["name"]]
        assert (one["left"] is None) == (last[one["name"]] == 8) == (folder / "COMPLETE").exists()
        for step, score in one["scores"].items():
            assert math.isclose(score, scores[one["name"]][int(step)], rel_tol=1e-4)
    best = min((n for n in last if last[n] == 8), key=lambda name: scores[name][8])
    assert f"the best: swept/{best}" in said
    words = best.replace(",", " ").replace("learning_rate", "optimizer.learning_rate").split()
    only = f"{words[0]}", f"tuning.{words[1]}"
    place.write("people/only/train.jsonl", (place.folder / "rows/train.jsonl").read_text())
    place.write("people/only/valid.jsonl", (place.folder / "rows/valid.jsonl").read_text())
    line = [
        sys.executable,
        "-m",
        "mlx_empire.daughters",
        "recipe.yaml",
        "--people",
        "people",
        *only,
        "run.dir=one",
    ]
    succeeded(started(place, [*line, "--work"], rank_environment(str(place.folder))))
    assert raw_tensors(place.folder / "one/only/final") == raw_tensors(
        place.folder / "swept" / best / "final"
    )
    assert curve(place.folder / "one/only") == curve(place.folder / "swept" / best)


@pytest.mark.slow
def test_comparisons_do_not_count_at_a_gate(place: Workspace) -> None:
    """Every evaluation passes; alone the second of its own is after three steps, and the first comparison after two."""
    gate = "evaluation.stop_when={metric: eval_loss, at_most: 100, for: 3}"
    succeeded(sweep(place, "learning_rate=1e-4,2e-2", "--keep", "2", "run.steps=9", "run.eval_every=3", gate))
    told = found_in(place)
    assert [one["step"] for one in told["rungs"]] == [4, 9]
    for one in told["settings"]:
        records = [r for r in metrics(place.folder / "swept" / one["name"]) if "eval_loss" in r]
        steps = [(r["step"], r.get("comparison", False)) for r in records]
        assert steps == [(0, False), (3, False), (4, True), (6, False)][: 3 if one["left"] else 4]


@pytest.mark.slow
def test_a_setting_with_a_damaged_save_begins_anew(place: Workspace, whole: Workspace) -> None:
    """Killed after the first comparison; the header of one setting's file does not tell its step any more."""
    assert sweep(place, *THREE, fault="step=5;phase=forward;action=kill").code == -signal.SIGKILL
    file = next((place.folder / "swept").glob("*/unfinished.safetensors"))
    file.write_bytes(file.read_bytes().replace(b"bookmark", b"bookmarc"))
    succeeded(sweep(place, *THREE))
    assert found_in(place) == found_in(whole)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(
    "fault", ["step=5;phase=forward", "phase=save-rename", "phase=evaluate;step=4", "phase=finish"]
)
def test_killed_anywhere_and_given_again_it_comes_to_the_same(
    fault: str, place: Workspace, whole: Workspace
) -> None:
    assert sweep(place, *THREE, fault=f"{fault};action=kill").code == -signal.SIGKILL
    succeeded(sweep(place, *THREE))
    assert found_in(place) == found_in(whole)
    for one in found_in(whole)["settings"]:
        if one["left"] is None:
            ours, theirs = (w.folder / "swept" / one["name"] for w in (place, whole))
            assert raw_tensors(ours / "final") == raw_tensors(theirs / "final")
            assert curve(ours) == curve(theirs)
    before = {p: p.stat().st_mtime_ns for p in (place.folder / "swept").rglob("metrics.jsonl")}
    succeeded(sweep(place, *THREE))
    assert {p: p.stat().st_mtime_ns for p in before} == before, "given once more it trains nothing"
