"""`list`, `status`, `compare` and `clean`, on run folders made by hand: what they tell, what goes, what never does."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.saying import said

from mlx_empire.data.splits import load_splits
from mlx_empire.run.lock import RUN, RunLock
from mlx_empire.run.status import date, status_rows

RECIPE = """\
model: {{path: m}}
data: {{path: d, sequence_length: 8}}
batch: {{global_size: 4}}
optimizer: {{learning_rate: {rate}}}
run: {{dir: {folder}, steps: {steps}}}
"""
Tree = dict[str, bytes]


def step(number: int, loss: float | None) -> dict[str, Any]:
    return {
        "step": number, "loss": loss, "tokens": 10, "tokens_per_second": 5.0, "step_seconds": 2.0,
        "time": 1000.0 + 2 * number, "peak_bytes": [3 << 30, 1 << 30],
    }  # fmt: skip


def made(
    folder: Path, *losses: float, held_out: dict[int, float] | None = None, steps: str = "4", rate: str = "0.001",
    complete: bool = False, digest: str = "sha256:a",
) -> Path:  # fmt: skip
    """A run's folder with these losses, and the held-out loss after some steps."""
    folder.mkdir(parents=True)
    records = [step(number, loss) for number, loss in enumerate(losses, 1)]
    records += [{"step": number, "eval_loss": loss} for number, loss in (held_out or {}).items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "recipe.yaml").write_text(RECIPE.format(rate=rate, folder=folder, steps=steps))
    node = {"node": {"name": "king"}, "peak_bytes": 4 << 30, "limit_bytes": 8 << 30}
    plan = {"steps": 4, "trainable_parameters": 7000, "data_digest": digest, "ranks": [node, node]}
    (folder / "plan.json").write_text(json.dumps(plan))
    if complete:
        (folder / "final").mkdir()
        (folder / "final" / "model.safetensors").write_bytes(b"w" * 9000)
        (folder / "COMPLETE").write_text("\n")
    return folder


def checkpoint(folder: Path, name: str, *extra: str) -> Path:
    """A checkpoint's folder of 20,000 bytes."""
    path = folder / "checkpoints" / name
    path.mkdir(parents=True)
    (path / "shard-00000-of-00001.safetensors").write_bytes(os.urandom(20000))
    for file in ("MANIFEST.json", "COMMIT", *extra):
        (path / file).write_text("x")
    return path


def tree(folder: Path) -> Tree:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_EMPIRE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `mlx-empire WORDS` prints; it must end with `code`."""

    return partial(said, capsys)


def cells(text: str) -> list[list[str]]:
    """A printed table's rows."""
    return [re.split(r" {2,}", line.rstrip()) for line in text.splitlines() if line.strip()]


def test_list_tells_state_step_losses_and_size_of_every_run(say: Callable[..., str]) -> None:
    made(Path("runs/done"), 4.0, 3.0, 2.0, 1.5, held_out={2: 3.5, 4: 2.25}, complete=True)
    made(Path("runs/half"), 4.0, 3.0, steps="2ep")
    made(Path("runs/people/alice"), 1.0, complete=True)
    (Path("runs") / "notes").mkdir()
    with RunLock(Path("runs/half"), RUN):
        head, *rows = cells(say("list"))
        found = json.loads(say("list", "runs", "--json"))
    assert head == ["run", "state", "step", "loss", "held out", "ends", "on the disk"]
    assert [row[:5] for row in rows] == [
        ["runs/done", "complete", "4 of 4", "1.5000", "2.2500"],
        ["runs/half", "running", "2 of 4", "3.0000", "-"],
        ["runs/people/alice", "complete", "1 of 4", "1.0000", "-"],
    ]
    assert [row[5].endswith("(in 4 s)") for row in rows] == [False, True, False], (
        "two steps of two seconds are left"
    )
    sizes = [
        int(
            subprocess.run(
                ["du", "-sk", one["folder"]], capture_output=True, text=True, check=True
            ).stdout.split()[0]
        )
        for one in found
    ]
    folders = [sum(1 for _ in Path(one["folder"]).rglob("*")) for one in found]
    for one, kib, entries in zip(found, sizes, folders, strict=True):
        assert abs(one["disk_bytes"] - 1024 * kib) <= 4096 * (1 + entries), "du counts the folder itself, too"
    assert [one["ends"] is None for one in found] == [True, False, True]


def test_a_folder_without_runs_names_the_command_that_makes_one(say: Callable[..., str]) -> None:
    Path("runs").mkdir()
    assert "mlx-empire train" in say("list")
    assert say("list", "nowhere", code=64) == "mlx_empire: nowhere: no such folder; say where the runs lie\n"


def test_status_tells_when_a_run_ends_what_memory_it_takes_and_what_it_said_last() -> None:
    folder = made(Path("run"), 4.0, 3.0, held_out={2: 3.5})
    (folder / "launch.log").write_text("one\ntwo\n\x1b[2mthree\n\nbar 10%\rbar 20%\nfour\nfive\n")
    with RunLock(folder, RUN):
        rows = dict(status_rows(folder, now=1010.0))
        silent = dict(status_rows(folder, now=1004.0 + 600))
    assert rows["run"] == "running, started without mlx-empire launch"
    assert rows["step"] == "2 of 4"
    assert rows["ends"] == f"about {date(1010.0 + 2 * 2.0)}"
    king = "king 3.00 GiB (plan 4.00 GiB, limit 8.00 GiB)"
    assert rows["memory"] == f"{king}\n{king.replace('3.00', '1.00')}"
    assert rows["last lines"].splitlines() == ["two", " [2mthree", "bar 20%", "four", "five"]
    assert "quiet" not in rows
    assert silent["quiet"] == "no step has ended for 10 min 00 s; one takes 2 s"
    ended = dict(status_rows(folder, now=1004.0 + 600))
    assert {"ends", "time left", "quiet"} & ended.keys() == set(), "what does not run does not end"


def test_a_date_is_that_of_this_machines_clock() -> None:
    moment = 1_764_861_600.0
    expected = subprocess.run(
        [sys.executable, "-c", f"import time; print(time.strftime('%a %d %b %H:%M', time.localtime({moment})))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert date(moment) == expected.replace(" 0", " ", 1)


def test_compare_shows_only_the_keys_that_differ_and_the_curves_at_common_steps(
    say: Callable[..., str],
) -> None:
    made(Path("a"), 4.0, 3.0, 2.0, held_out={1: 4.5, 3: 2.5}, complete=True)
    made(Path("b"), 4.0, 3.5, rate="0.01", steps="9", held_out={1: 4.5, 2: 3.75}, digest="sha256:b")
    rows = {row[0]: row[1:] for row in cells(say("compare", "a", "b"))}
    assert rows["recipe"] == rows["what came of it"] == ["a", "b"]
    assert {key: value for key, value in rows.items() if "." in key} == {
        "optimizer.learning_rate": ["0.001", "0.01"],
        "run.steps": ["4", "9"],
    }
    assert rows["state"] == ["complete", "not finished"]
    assert rows["data"] == ["A", "B"]
    assert rows["loss, mean of 20 to step 2"] == ["3.5000", "3.7500"]
    assert "loss, mean of 20 to step 3" not in rows
    assert rows["held-out loss after step 1"] == ["4.5000", "4.5000"]
    assert rows["best held-out loss"] == ["2.5000 after step 3", "3.7500 after step 2"]
    assert rows["targets learnt"] == ["30", "20"]
    assert rows["in all"] == ["6 s", "4 s"]
    assert rows["largest peak of a rank"] == ["3.00 GiB", "3.00 GiB"]
    assert "two runs" in say("compare", "a", code=64)
    assert "no run has been here" in say("compare", "a", ".", code=64)


def test_runs_of_one_recipe_say_so(say: Callable[..., str]) -> None:
    for name in ("a", "b"):
        made(Path(name), 4.0)
    assert "the recipes say the same" in say("compare", "a", "b")


def stored_tokens() -> Path:
    """An entry of the token cache, as a run stores it."""
    Path("rows.jsonl").write_text("".join(f'{{"tokens": [{n}, 1, 2, 3]}}\n' for n in range(4)))
    load_splits(path="rows.jsonl", sequence_length=4)
    (index,) = Path("cache").rglob("index.json")
    return index.parent


def kept_things() -> tuple[list[Path], list[Path]]:
    """Runs in every state: the folders that may go, and those that may not."""
    done = made(Path("runs/done"), 4.0, complete=True)
    goes = [checkpoint(done, name) for name in ("step-000002", "step-000004", "superseded-000003-0123abcd")]
    goes.append(checkpoint(done, ".tmp-6-0123abcd"))
    stays = [checkpoint(done, "step-000003", "KEEP"), checkpoint(done, "superseded-000001-0123abcd", "KEEP")]
    stays.append(checkpoint(done, "mine"))
    partial = done / ".final.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"w" * 9000)
    goes.append(partial)
    stays.append(checkpoint(made(Path("runs/half"), 4.0), "step-000001"))
    held = made(Path("runs/held"), 4.0, complete=True)
    stays.append(checkpoint(held, "step-000001"))
    outside = checkpoint(made(Path("elsewhere"), 4.0), "step-000009")
    linked = made(Path("runs/linked"), 4.0, complete=True)
    (linked / "checkpoints").symlink_to(outside.parent.absolute())
    stays.append(outside)
    cached = stored_tokens()
    (Path("cache") / "thesis").mkdir()
    (Path("cache") / "thesis" / "text").write_text("mine")
    return [*goes, cached], [*stays, Path("cache/thesis")]


def test_clean_says_what_it_would_free_and_deletes_nothing(say: Callable[..., str]) -> None:
    goes, _ = kept_things()
    before = tree(Path())
    with RunLock(Path("runs/held"), RUN):
        text = say("clean")
    rows = {row[0]: row for row in cells(text)}
    assert {Path(name) for name in rows if name.startswith(("runs/", "/"))} == {
        path if path.parts[0] == "runs" else path.absolute() for path in goes
    }
    assert rows["runs/done/checkpoints/step-000002"][2] == "28 KiB"
    assert "Nothing was deleted" in text
    assert tree(Path()).keys() - before.keys() <= {"runs/held/LOCK"}
    assert {name: content for name, content in tree(Path()).items() if name in before} == before


def test_clean_with_yes_deletes_that_and_nothing_else(say: Callable[..., str]) -> None:
    goes, stays = kept_things()
    before = tree(Path())
    gone = {name for name in before if any(Path(name).is_relative_to(path) for path in goes)}
    assert gone
    with RunLock(Path("runs/held"), RUN):
        assert "deleted" in say("clean", "--yes")
    after = tree(Path())
    assert after == {name: content for name, content in before.items() if name not in gone}
    assert not any(path.exists() for path in goes)
    assert all(path.is_dir() for path in stays)
    assert (Path("runs/done/final") / "model.safetensors").stat().st_size == 9000
    with RunLock(Path("runs/held"), RUN):
        assert "nothing to delete" in say("clean", "--yes")


def test_a_run_that_began_again_after_it_was_listed_is_left_alone(
    say: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_empire.runs import clean, show

    found = checkpoint(made(Path("runs/done"), 4.0, complete=True), "step-000002")
    listed = clean.deletions(show.found_in(Path("runs")))
    with RunLock(Path("runs/done"), RUN), pytest.raises(OSError, match="at work again"):
        clean.delete(listed[0])
    (found / "KEEP").touch()
    with pytest.raises(OSError, match="KEEP"):
        clean.delete(listed[0])
    assert found.is_dir()


def test_what_could_not_be_deleted_is_not_counted_as_freed(
    say: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_empire.runs import clean

    done = made(Path("runs/done"), 4.0, complete=True)
    goes, stays = (checkpoint(done, name) for name in ("step-000002", "step-000004"))
    remove = clean.remove_checkpoint

    def refusing(folder: Path) -> None:
        if folder.name == stays.name:
            raise OSError(errno.EACCES, "Permission denied", str(folder))
        remove(folder)

    monkeypatch.setattr(clean, "remove_checkpoint", refusing)
    text = say("clean", "--yes", code=64)
    assert "deleted, but for 1: 28 KiB in all" in text
    assert f"{stays}: Permission denied" in text
    assert (goes.exists(), stays.exists()) == (False, True)


def test_reading_a_run_imports_no_mlx_and_writes_nothing(tmp_path: Path) -> None:
    made(Path("runs/done"), 4.0, 3.0, complete=True)
    before = tree(Path())
    program = (
        "import sys\nfrom mlx_empire.cli import main\n"
        "for words in (['list'], ['status', 'runs/done'], ['compare', 'runs/done', 'runs/done'], ['clean'],\n"
        f"    ['open', 'runs/done', '--save', {str(tmp_path.parent / 'page.html')!r}]):\n"
        "    assert main(words) == 0\n"
        "assert 'mlx' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert tree(Path()) == before


def test_what_a_damaged_folder_holds_is_told_in_one_line_or_left_out(say: Callable[..., str]) -> None:
    folder = made(Path("runs/odd"), 4.0)
    (folder / "plan.json").write_text("[1, 2")
    (folder / "recipe.yaml").write_text(": no recipe\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss"')
    assert cells(say("list"))[1][:4] == ["runs/odd", "not finished", "1", "4.0000"]
    say("status", folder)
    say("compare", folder, folder)
    (folder / "launch.json").write_text("{")
    assert say("list", code=64).count("\n") == 1
