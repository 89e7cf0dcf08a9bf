"""A run folder that was moved, copied, linked to or whose machines were renamed goes on to the same bits.

`together`: the ranks share one checkpoint folder, as on one machine. `apart`: each has its own with a copy of the
other's shard, as on two.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.faults import MODEL, Command, Lab, Outcome, Result, flip, succeeded

STEPS = [3, 6]
NEWEST = "step-000006"
OTHER_DISK = Path("/dev/shm")
FORMER = "former-name"


@dataclass(frozen=True)
class Case:
    """How a run folder with the checkpoints of STEPS came to lie where it lies, and on how many ranks it goes on."""

    ranks: int
    layout: str
    move: str
    damaged: bool = False

    def __str__(self) -> str:
        damage = ", damaged" if self.damaged else ""
        return f"{self.ranks} {self.layout} {self.move}{damage}"

    @property
    def name(self) -> str:
        return str(self).replace(",", "").replace(" ", "-")

    @property
    def resumed(self) -> int:
        """The damaged shard is replaced by its copy where another rank has one."""
        return 3 if self.damaged and (self.layout == "together" or self.ranks == 1) else 6

    def folders(self, run: Path) -> list[Path]:
        """Where its checkpoints lie."""
        return [run / "checkpoints"] if self.layout == "together" else [run / f"node-{r}" for r in (0, 1)]


def moved(lab: Lab, case: Case, run: Path) -> list[object]:
    """The copy of checkpoints that were written elsewhere is all that a move is, for those who read them."""
    return []


def copied(lab: Lab, case: Case, run: Path) -> list[object]:
    """With the fresh lock of a run on another machine, and what a launcher left."""
    lock = {"host": "king", "pid": 4711, "since": "2026-01-02T03:04:05+00:00", "file": 1}
    (run / "LOCK").write_text(json.dumps(lock))
    (run / "launch.lock").touch()
    (run / "launch.json").write_text(json.dumps({"pid": 4711, "host": "king", "command": "elsewhere"}))
    return []


def renamed(lab: Lab, case: Case, run: Path) -> list[object]:
    """As if the machine had had another name when it saved."""
    for manifest in run.glob("*/step-*/MANIFEST.json"):
        record = json.loads(manifest.read_text())
        for shard in record["shards"]:
            shard["host"] = FORMER
        manifest.write_text(json.dumps(record))
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
        commit = manifest.with_name("COMMIT")
        commit.write_text(json.dumps(json.loads(commit.read_text()) | {"manifest": digest}))
    return []


def in_a_folder_of_its_former_name(lab: Lab, case: Case, run: Path) -> list[object]:
    (run / "metrics.jsonl").touch()
    for folder in case.folders(run):
        folder.rename(folder.with_name(f"{FORMER}-{folder.name}"))
    name = "checkpoints" if case.layout == "together" else "node-{rank}"
    return [f"run.checkpoints={run.name}/{{host}}-{name}"]


def spelled_otherwise(lab: Lab, case: Case, run: Path) -> list[object]:
    """Absolute where the recipe was relative, and the other way round."""
    model = os.path.relpath(MODEL, lab.folder)
    data = lab.folder / "rows.jsonl"
    places = [f"run.dir={run}", *(["run.checkpoints=null"] if case.layout == "together" else [])]
    return [*places, f"model.path={model}", f"data.path={data}"]


def linked_to(lab: Lab, case: Case, run: Path) -> list[object]:
    real = run.rename(run.with_name(f"real-{run.name}"))
    run.symlink_to(real)
    return []


def on_another_disk(lab: Lab, case: Case, run: Path) -> list[object]:
    """The checkpoints behind links, each to a folder on another file system."""
    for folder in case.folders(run):
        target = Path(tempfile.mkdtemp(dir=OTHER_DISK, prefix=PREFIX)) / folder.name
        shutil.move(folder, target)
        folder.symlink_to(target)
    return []


PREFIX = f"moved-{os.getpid()}-"
MOVES: dict[str, Callable[[Lab, Case, Path], list[object]]] = {
    "moved": moved,
    "copied": copied,
    "renamed": renamed,
    "former name": in_a_folder_of_its_former_name,
    "spelled otherwise": spelled_otherwise,
    "linked to": linked_to,
    **({"other disk": on_another_disk} if os.access(OTHER_DISK, os.W_OK) else {}),
}
ALWAYS = [Case(2, "together", "moved"), Case(2, "together", "copied", damaged=True)]
OTHERS = [
    case
    for ranks in (1, 2)
    for layout in ("together", "apart")
    for move in MOVES
    for damaged in (False, True)
    if (case := Case(ranks, layout, move, damaged)) not in ALWAYS
]


def ended(lab: Lab, cases: list[Case]) -> dict[Case, Outcome]:
    """All cases of one layout on one number of ranks in one launch."""
    outcomes = {}
    for ranks, layout in sorted({(case.ranks, case.layout) for case in cases}):
        mine = [case for case in cases if (case.ranks, case.layout) == (ranks, layout)]
        commands = {case.name: Command(prepared(lab, case)) for case in mine}
        found = lab.train_many(commands, ranks)
        outcomes |= {case: found[case.name] for case in mine}
    return outcomes


def prepared(lab: Lab, case: Case) -> list[object]:
    """Make the run folder of a case; the arguments with which it goes on."""
    run = lab.folder / case.name
    folders = case.folders(run)
    for rank, folder in enumerate(folders):
        for step in STEPS:
            name = f"step-{step:06d}"
            shutil.copytree(lab.checkpoints("base", rank) / name, folder / name)
    if case.damaged:
        flip(folders[0] / NEWEST / "shard-00000-of-00002.safetensors", -1)
    places = ["run.checkpoints=null"] if case.layout == "together" else []
    return [*places, *MOVES[case.move](lab, case, run)]


def check(lab: Lab, base: Result, outcome: Outcome, case: Case) -> None:
    succeeded(outcome)
    assert outcome.resumed == case.resumed
    assert lab.result(case.name) == base.after(case.resumed)
    damage = [line for line in outcome.stdout.splitlines() if "WARNING" in line]
    assert len(damage) == case.damaged
    assert all("shard-00000-of-00002.safetensors: tensor " in line for line in damage)
    if case.move == "renamed":
        assert f"on {FORMER}, " in outcome.stdout
        assert f" on {socket.gethostname()}" in outcome.stdout
    if case.move == "copied":
        assert "was copied from where process 4711 on king, since " in outcome.stdout


@pytest.fixture(scope="module")
def always(lab: Lab) -> dict[Case, Outcome]:
    return ended(lab, ALWAYS)


@pytest.mark.parametrize("case", ALWAYS, ids=str)
def test_two_ranks_of_one_machine_go_on_from_a_moved_folder(
    lab: Lab, base: Result, always: dict[Case, Outcome], case: Case
) -> None:
    check(lab, base, always[case], case)


@pytest.fixture(scope="module")
def others(lab: Lab) -> Iterator[dict[Case, Outcome]]:
    yield ended(lab, OTHERS)
    for folder in OTHER_DISK.glob(f"{PREFIX}*"):
        shutil.rmtree(folder)


@pytest.mark.faults
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_a_run_folder_goes_on_wherever_it_lies(
    lab: Lab, base: Result, others: dict[Case, Outcome], case: Case
) -> None:
    check(lab, base, others[case], case)
