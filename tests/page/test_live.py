"""What an open page is told: everything once, then what is new, and everything again where a run went back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.run_folders import evaluation, lines, made_run, records, step

from mlx_empire.errors import UserError
from mlx_empire.page import live, watch
from mlx_empire.page.documents import run_document
from mlx_empire.page.live import RunFeed
from mlx_empire.page.series import MOST_POINTS
from mlx_empire.page.watch import Gallery, WatchedRun
from mlx_empire.run import overview
from mlx_empire.run.lock import RUN, RunLock


class Reader:
    """Keeps what a page would keep."""

    def __init__(self, feed: RunFeed) -> None:
        self._feed = feed
        self.panels: dict[str, str] = {}
        self.curves: dict[tuple[str, str], list[list[float]]] = {}
        self.wholes = 0

    def hear(self) -> dict[str, Any] | None:
        news = self._feed.news()
        message = json.loads(json.dumps(news, allow_nan=False))
        if message is None:
            return None
        self.panels |= message.get("panels", {})
        if "charts" in message:
            self.wholes += 1
            self.curves = {
                (c["key"], one["name"]): one["points"] for c in message["charts"] for one in c["lines"]
            }
        for key, found in message.get("more", {}).items():
            for name, (x, y) in found.items():
                self.curves[key, name][0] += x
                self.curves[key, name][1] += y
        return dict(message)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made_run(tmp_path / "run", 30)


def append(folder: Path, *found: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(lines(found))


def test_a_page_hears_everything_once_and_then_what_is_new(folder: Path) -> None:
    reader = Reader(RunFeed(WatchedRun(folder, "run")))
    reader.hear()
    assert reader.curves["loss", "training"][0] == list(range(1, 31))
    assert set(reader.panels) == {"head", "machines", "time", "story", "samples", "capacity", "recipe", "log"}
    assert reader.hear() is None
    append(folder, step(31), evaluation(31), step(32))
    message = reader.hear()
    assert message is not None
    assert "charts" not in message
    assert set(message["panels"]) == {"head"}, "the rest says the same"
    assert message["more"]["loss"]["training"] == [
        [31, 32],
        [float(f"{step(n)['loss']:.6g}") for n in (31, 32)],
    ]
    assert reader.curves["loss", "held out"][0] == [0, 10, 20, 30, 31]
    assert reader.wholes == 1


def test_steps_that_a_resumed_run_repeats_go_and_come_again(folder: Path) -> None:
    reader = Reader(RunFeed(WatchedRun(folder, "run")))
    reader.hear()
    (folder / "metrics.jsonl").write_text(lines(records(1, 10)))
    reader.hear()
    assert reader.curves["loss", "training"][0] == list(range(1, 11))
    assert "10 of 100" in reader.panels["head"]
    append(folder, step(11, loss=7.0))
    reader.hear()
    assert reader.curves["loss", "training"][1][-1] == 7.0
    assert reader.wholes == 2


def test_a_page_never_has_more_points_than_may_be_drawn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "AT_FIRST", 20)
    monkeypatch.setattr(live, "MOST_POINTS", 40)
    reader = Reader(RunFeed(WatchedRun(folder, "run")))
    for first in range(31, 131, 10):
        reader.hear()
        append(folder, *records(first, first + 9))
        reader.hear()
        assert max(len(x) for x, _ in reader.curves.values()) <= 40
        assert reader.curves["loss", "training"][0][-1] == first + 9
    assert reader.wholes > 3
    assert live.AT_FIRST < MOST_POINTS


def test_a_run_that_goes_on_says_when_it_ends_and_where_its_ranks_are(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", 30, cause="was killed by SIGKILL")
    ended = Reader(RunFeed(WatchedRun(folder, "run")))
    ended.hear()
    with RunLock(folder, RUN):
        alive = Reader(RunFeed(WatchedRun(folder, "run")))
        alive.hear()
    assert "forward, step 31" in alive.panels["machines"]
    assert "ends, in 11 min 40 s" in alive.panels["head"], "70 steps of 10 seconds"
    assert "no step has ended for" in alive.panels["head"]
    assert "forward" not in ended.panels["machines"]
    assert "ends" not in ended.panels["head"]


def test_readers_of_one_run_do_not_take_from_each_other(folder: Path) -> None:
    watched = WatchedRun(folder, "run")
    one, other = Reader(RunFeed(watched)), Reader(RunFeed(watched))
    one.hear()
    append(folder, step(31))
    one.hear()
    other.hear()
    assert one.curves == other.curves


def test_what_a_page_says_of_a_look_is_made_once_for_all_readers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(live, "run_document", lambda *words: made.append(words) or run_document(*words))
    watched = WatchedRun(folder, "run")
    readers = [Reader(RunFeed(watched)) for _ in range(10)]
    for number in (31, 32):
        for reader in readers:
            reader.hear()
        append(folder, step(number))
    assert len(made) == 2
    assert all(reader.panels == readers[0].panels for reader in readers)


def test_of_many_runs_each_recipe_is_read_once_for_each_state_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    load = overview.load_recipe
    monkeypatch.setattr(overview, "load_recipe", lambda path: asked.append(path) or load(path))
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.0)
    for number in range(70):
        made_run(tmp_path / "runs" / f"run-{number}", 1)
    gallery = Gallery(tmp_path / "runs")
    for _ in range(2):
        assert all(look.overview.recipe is not None for _, look in gallery.looks())
    assert len(asked) == 70
    changed = tmp_path / "runs" / "run-7" / "recipe.yaml"
    changed.write_text(changed.read_text().replace("1.0e-5", "2.0e-5"))
    (found,) = [look for run, look in gallery.looks() if run.name == "run-7"]
    assert found.overview.recipe is not None
    assert found.overview.recipe.optimizer.learning_rate == 2e-5
    assert len(asked) == 71


def test_what_cannot_be_read_is_told_to_everybody_who_asks(folder: Path) -> None:
    watched = WatchedRun(folder, "run")
    (folder / "launch.json").write_text("{")
    for _ in range(2):
        with pytest.raises(UserError, match=r"launch\.json: cannot be read"):
            watched.look()
    (folder / "launch.json").unlink()
    assert watched.look() is not None


def test_a_gallery_leads_to_its_runs_and_to_nothing_else(tmp_path: Path) -> None:
    made_run(tmp_path / "runs" / "people" / "alice")
    made_run(tmp_path / "other")
    gallery = Gallery(tmp_path / "runs")
    assert [run.name for run in gallery.runs()] == ["people/alice"]
    assert gallery.run("people/alice") is not None
    for name in ("../other", "people/../../other", "people", "", str(tmp_path / "other")):
        assert gallery.run(name) is None
