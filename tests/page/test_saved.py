"""The page as one file: whole, without a script or anything from elsewhere, and small however long the run was."""

from __future__ import annotations

import json
import re
import shlex
import stat
from pathlib import Path

import pytest
from support.outline import Outline
from support.run_folders import HOSTILE, lines, made_run, records, step
from support.saying import said

from mlx_empire.capacity import command as capacity
from mlx_empire.page.documents import run_document
from mlx_empire.page.samples import samples_beside
from mlx_empire.page.saved import FILE_NAME, save_report, try_report
from mlx_empire.page.watch import Gallery, WatchedRun
from mlx_empire.recipe.load import load_recipe
from mlx_empire.run.what_next import next_commands

MOST_BYTES = 2_000_000


def test_one_well_formed_file_that_fetches_and_runs_nothing_whatever_names_say(tmp_path: Path) -> None:
    folder = made_run(
        tmp_path / HOSTILE, hosts=(HOSTILE, "soldier"), data=HOSTILE, cause=HOSTILE, log=f"{HOSTILE}\n",
    )  # fmt: skip
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(lines([{"step": 30, "eval_loss": 1.0, "scores": {HOSTILE: 0.5}}]) + '{"step": 31, "lo')
    out = save_report(folder)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    outline = Outline(out.read_text())
    assert outline.open == []
    assert outline.suspicious == []
    assert not outline.tags & {"script", "img", "iframe", "object", "form"}
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", out.read_text())
    assert outline.text.count(HOSTILE) >= 10, "name, host, data, cause, log, score, sample"


def test_it_says_what_the_folder_says(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "scout", 30, cause="was killed by SIGKILL", log="a line\nthe last line\n")
    text = Outline(save_report(folder).read_text()).text
    for words in (
        "30 of 100", "300 GiB of 460 GiB", "planned 317 GiB", "step 30", "step 20", "1 of 3", "the last line",
        "rank 1 on soldier-1: was killed by SIGKILL", "in backward, step 15", "gate 0.95", "1e-05",
        "the others wait for it", "8.5 s 85.0 %",
        "planned for these chips 8 to 12.5 s, measured 10 s", "waiting for all-gather 1 s 10.0 %",
        f"{1.1 + 2.718281828 ** -0.6:.4f}", "The model writes written after 0 steps: speeches",
        "The model writes written after 30 steps: speeches", "The row goes on b speeches",
    ):  # fmt: skip
        assert words in text, words


def test_what_was_measured_leads_to_what_was_planned_and_to_the_command_that_plans_it(tmp_path: Path) -> None:
    folder = made_run(tmp_path / HOSTILE)
    page = save_report(folder).read_text()
    assert page.count('href="#panel-capacity"') == page.count('id="panel-capacity"') == 1
    typed = f"mlx-empire capacity {shlex.quote(str(folder / 'recipe.yaml'))} --hosts HOSTFILE --html capacity.html"
    assert typed in Outline(page).text
    (folder / "HOSTFILE").touch()
    words = capacity.read(shlex.split(typed.replace("HOSTFILE", shlex.quote(str(folder / "HOSTFILE"))))[2:])
    assert load_recipe(words.recipe).run.steps.value == 100
    one = made_run(tmp_path / "alone", hosts=["king"])
    (one / "metrics.jsonl").write_text(lines([step(1, ranks=1)]))
    assert f"{one}/recipe.yaml --html capacity.html" in Outline(save_report(one).read_text()).text
    (one / "metrics.jsonl").write_text("")
    assert 'panel-capacity" class' in (unmeasured := save_report(one).read_text())
    assert 'href="#panel-capacity"' not in unmeasured, "there is nothing to see there yet"


def test_a_finished_run_names_the_commands_that_come_next(tmp_path: Path) -> None:
    going, done = (made_run(tmp_path / name, complete=name == "done") for name in ("going", "done"))
    text = Outline(save_report(done).read_text()).text
    for line in next_commands(load_recipe(done / "recipe.yaml"))[1:]:
        assert " ".join(line.split()) in text
    assert "mlx_lm.generate" not in Outline(save_report(going).read_text()).text


def test_a_model_that_no_machine_holds_is_shown_as_it_reads_and_writes_nothing(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "scout")
    found = json.loads((folder / "samples.json").read_text())
    found["first"]["texts"][0].pop("continued")  # as runs wrote it before they went on with rows
    found["last"]["texts"][0]["continued"] = None
    (folder / "samples.json").write_text(json.dumps(found))
    text = Outline(save_report(folder).read_text()).text
    assert "after step 30: mean probability 48 %" in text
    assert "The model writes" not in text


def test_runs_beside_each_other_show_what_each_writes_after_one_prompt(tmp_path: Path) -> None:
    made_run(tmp_path / "runs" / "one", 10)
    made_run(tmp_path / "runs" / "two", 20)
    (sample,) = samples_beside([look for _, look in Gallery(tmp_path / "runs").looks()])
    assert [(view.when.partition(",")[0], view.written) for view in sample.views] == [
        ("one", "written after 10 steps: speeches"),
        ("two", "written after 20 steps: speeches"),
    ]
    assert (sample.prompt, sample.held_out) == ("a", " b speeches")


def test_checkpoints_that_lie_elsewhere_are_told_alike_everywhere(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "scout", 30)
    (folder / "checkpoints").rename(tmp_path / "disk-0")
    (tmp_path / "disk-0" / "step-000020" / "KEEP").touch()
    (tmp_path / "disk-0" / "step-000030" / "COMMIT").unlink()
    recipe = (folder / "recipe.yaml").read_text()
    elsewhere = f"run: {{checkpoints: '{tmp_path}/disk-{{rank}}', "
    (folder / "recipe.yaml").write_text(recipe.replace("run: {", elsewhere))
    look = WatchedRun(folder, "scout").look()
    assert look is not None
    run = run_document(look, 1000.0)
    assert {figure.name: figure.value for figure in run.figures}["last checkpoint"] == "step 20"
    assert run.checkpoints == ["step 20 (kept: KEEP)", "step 10"]
    assert [tick.part for tick in run.ticks] == [0.1, 0.2]


def test_a_long_run_is_a_small_file(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", 3)
    (folder / "metrics.jsonl").write_text(lines(records(1, 5000)))
    page = save_report(folder).read_text()
    assert len(page) < MOST_BYTES / 4, "800 points a curve, whatever the length"
    assert page.count("<polyline") >= 7


def test_open_save_writes_it_and_names_what_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made_run(Path("run"))
    assert said(capsys, "open", "run", "--save", "mine.html") == "mine.html\n"
    assert Path("mine.html").read_text().startswith("<!DOCTYPE html>")
    monkeypatch.chdir("run")
    said(capsys, "open", ".", "--save", "../mine.html")
    Path("final").mkdir()
    monkeypatch.chdir("final")
    said(capsys, "open", "..", "--save", "../../of-its-parent.html")
    monkeypatch.chdir(tmp_path)
    for page in ("mine.html", "of-its-parent.html"):
        assert "<h1>run</h1>" in Path(page).read_text()
    Path("empty").mkdir()
    assert "no run has been here" in said(capsys, "open", "empty", "--save", "x.html", code=64)
    assert "no such folder" in said(capsys, "open", "nowhere", code=64)
    assert "neither --lan" in said(capsys, "open", "run", "--save", "x.html", "--lan", code=64)


def test_a_run_ends_well_also_where_its_page_cannot_be_written(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", complete=True)
    assert try_report(folder) == f"the run as a page: {folder / FILE_NAME}"
    (folder / "launch.json").write_text("{")
    assert try_report(folder).startswith("WARNING: ")


@pytest.mark.parametrize("name", ["plan.json", "recipe.yaml", "launch.json"])
@pytest.mark.parametrize("content", ["", "[1, 2]", '{"ranks": [{"node": 3}], "steps": "many"}'])
def test_what_is_damaged_is_left_out_or_told(tmp_path: Path, name: str, content: str) -> None:
    folder = made_run(tmp_path / "run")
    (folder / name).write_text(content)
    assert "report" in try_report(folder) or "launch.json" in try_report(folder)
    if name != "launch.json":
        assert "30" in save_report(folder).read_text()
