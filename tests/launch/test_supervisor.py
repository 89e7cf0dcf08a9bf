"""What happens after each kind of end: done, restart, other machines, give up, stop. mpirun is a script here."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mlx_empire.cluster.hostfile import Host, load_hostfile
from mlx_empire.errors import LostRankError
from mlx_empire.launch import supervisor as supervisor_module
from mlx_empire.launch.machines import NothingWired
from mlx_empire.launch.process import Asked
from mlx_empire.launch.supervisor import Supervisor
from mlx_empire.run.launched import RunFolder
from mlx_empire.run.mpirun import Launch
from mlx_empire.run.stop import request_stop

FAKE = Path(__file__).with_name("fake_mpirun.py")
HOSTS = "king.local slots=1 # memory=512GiB\nsoldier-1.local slots=1\nme@soldier-2.local slots=1 # memory=256GiB\n"
KILLED = "place 1 reduce 4; die 1 9; exit 137"


class Scene:
    """A supervisor over scripted launches, and what it did."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.run = folder, folder / "run"
        self.said: list[str] = []
        self.notices: list[tuple[str, str]] = []
        self.launched: list[Launch] = []
        self.asked = Asked()
        (folder / "hosts.txt").write_text(HOSTS)
        monkeypatch.setattr(supervisor_module, "mpirun_line", self._line)

    def _line(self, launch: Launch, environment: object) -> list[str]:
        self.launched.append(launch)
        return [sys.executable, str(FAKE), str(self.run)]

    def play(
        self,
        launches: Sequence[str],
        budget: int = 5,
        probe: Callable[[Host], str] = lambda host: "",
        grace: float = 60.0,
        memory: object = None,
    ) -> int:
        (self.folder / "launches").write_text("\n".join(launches) + "\n")
        hostfile = self.folder / "hosts.txt"
        with RunFolder(self.run) as run:
            return Supervisor(
                Launch(
                    hostfile,
                    load_hostfile(hostfile),
                    Path("recipe.yaml"),
                    with_fewer=("memory.shares=memory",),
                ),
                run,
                {"PATH": "/usr/bin:/bin"},
                self.asked,
                budget,
                "the same command again",
                probe,
                memory or NothingWired(),  # type: ignore[arg-type]
                grace,
                0.0,
                self.said.append,
                lambda kind, sentence: self.notices.append((kind, sentence)),
            ).run()

    @property
    def report(self) -> str:
        return "\n".join(self.said)

    @property
    def state(self) -> dict[str, object]:
        return json.loads((self.run / "launch.json").read_text())


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


def test_a_complete_run_is_launched_once(scene: Scene) -> None:
    assert scene.play(["complete"]) == 0
    assert len(scene.launched) == 1
    assert scene.state["said"] == "complete"
    assert (scene.run / "launch.json").stat().st_mode & 0o777 == 0o600


def test_it_is_noted_where_each_rank_is(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_empire.launch.supervisor.NOTE_SECONDS", 0.0)
    assert scene.play(["place 0 forward 3; place 1 reduce 3; sleep 1; complete"]) == 0
    assert scene.state["places"] == {"0": ["forward", 3], "1": ["reduce", 3]}


def test_leaving_with_0_is_not_complete(scene: Scene) -> None:
    assert scene.play(["exit 0"], budget=0) == 75
    assert "wrote no COMPLETE" in scene.report


def test_a_lost_rank_is_reported_and_the_run_started_again(scene: Scene) -> None:
    assert scene.play([f"save 3; {KILLED}", "complete"]) == 0
    assert len(scene.launched) == 2
    (report,) = [text for text in scene.said if "the run failed" in text]
    for part in (
        "rank 1 on king was killed by SIGKILL",
        "reduce, step 4",
        "step 3",
        "the same command again",
    ):
        assert part in report
    assert "restart 1 of 5, from the checkpoint of step 3" in scene.report
    (failure,) = scene.state["failures"]  # type: ignore[misc]
    assert (failure["rank"], failure["phase"], failure["step"], failure["committed"]) == (1, "reduce", 4, 3)


@pytest.mark.parametrize("code", [3, 64, 65, 70])
def test_what_ranks_refuse_is_never_started_again(scene: Scene, code: int) -> None:
    assert scene.play([f"fail {code} this cannot be; exit {code}", "complete"]) == code
    assert len(scene.launched) == 1
    assert scene.report.count("this cannot be") == 1


def test_the_budget_is_kept(scene: Scene) -> None:
    launches = [f"save {step}; {KILLED}" for step in range(1, 9)]
    assert scene.play(launches, budget=3) == 75
    assert len(scene.launched) == 4
    assert "the budget of 3 is spent" in scene.report


@pytest.mark.parametrize("before", [[], [f"save 3; {KILLED}"], [f"save 3; {KILLED}", f"save 6; {KILLED}"]])
def test_a_crash_loop_is_stopped_after_two_restarts_without_progress(scene: Scene, before: list[str]) -> None:
    assert scene.play([*before, *[KILLED] * 9], budget=9) == 75
    assert len(scene.launched) == (len(before) or 1) + 2
    assert "no progress between restarts" in scene.report


def test_one_fruitless_restart_is_no_crash_loop(scene: Scene) -> None:
    launches = [f"save 3; {KILLED}", KILLED, f"save 6; {KILLED}", KILLED, "complete"]
    assert scene.play(launches, budget=9) == 0


def test_a_machine_that_stays_away_is_left_out_and_taken_back(scene: Scene) -> None:
    probes: list[str] = []

    def probe(host: Host) -> str:
        probes.append(host.name)
        return "no answer" if host.name == "soldier-1.local" and 3 < len(probes) <= 6 else ""

    assert scene.play([KILLED, f"save 3; {KILLED}", "complete"], probe=probe) == 0
    names = [[host.name for host in launch.cluster.nodes] for launch in scene.launched]
    everyone = ["king.local", "soldier-1.local", "soldier-2.local"]
    assert names == [everyone, ["king.local", "soldier-2.local"], everyone]
    assert [launch.overrides for launch in scene.launched] == [(), ("memory.shares=memory",), ()]
    smaller = scene.launched[1].hostfile
    assert smaller.parent == scene.run
    assert smaller.read_text().splitlines()[1:] == [HOSTS.splitlines()[0], HOSTS.splitlines()[2]]
    assert load_hostfile(smaller).nodes[1].user == "me"
    assert (scene.folder / "hosts.txt").read_text() == HOSTS
    assert "GOING ON WITHOUT soldier-1.local" in scene.report


def test_a_machine_that_is_not_there_at_the_start_is_named_and_nothing_launched(scene: Scene) -> None:
    with pytest.raises(LostRankError, match=r"soldier-2\.local: no route"):
        scene.play(["complete"], probe=lambda host: "no route" if host.name == "soldier-2.local" else "")
    assert scene.launched == []
    assert not scene.run.exists()


def test_a_rest_that_does_not_fit_ends_with_3(scene: Scene) -> None:
    away = iter(["", "", "", "gone", "", ""])
    assert (
        scene.play([KILLED, "fail 3 soldier-2.local is 10 GiB short; exit 3"], probe=lambda host: next(away))
        == 3
    )
    assert "GOING ON WITHOUT" in scene.report


def test_a_stop_file_becomes_a_request_and_is_no_failure(scene: Scene) -> None:
    def ask() -> None:
        while not (scene.run / "launch.json").exists():
            time.sleep(0.02)
        request_stop(scene.run)

    asking = threading.Thread(target=ask)
    asking.start()
    assert scene.play(["wait", "complete"]) == 143
    asking.join()
    assert len(scene.launched) == 1
    assert "stopped on request" in scene.report
    assert scene.state["code"] == 143


def test_the_second_request_does_not_wait_even_for_mpirun_that_does_not_listen(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_empire.launch.process.KILL_SECONDS", 0.3)
    scene.asked.times = 2
    assert scene.play(["ignore; sleep 60"]) == 143


def test_an_mpirun_that_cannot_end_after_a_failure_is_ended(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_empire.launch.process.KILL_SECONDS", 0.3)
    assert scene.play(["ignore; fail 75 rank 1 is silent; sleep 60", "complete"], grace=0.2) == 0
    assert "rank 1 is silent" in scene.report


def test_memory_that_is_not_given_back_prevents_a_restart(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_empire.launch.machines.WAIT_SECONDS", 0.0)

    class Stranded:
        held = 10 << 30

        def wired(self) -> dict[str, int]:
            self.held += 100 << 30
            return {"king.local": self.held}

    assert scene.play([KILLED, "complete"], memory=Stranded()) == 75
    assert "restart that machine" in scene.report
    assert len(scene.launched) == 1


FULL = "fail 75 the GPU ran out of memory: [METAL] (00000008: ...); exit 75"


def test_a_gpu_that_ran_out_of_memory_is_tried_once_more(scene: Scene) -> None:
    assert scene.play([f"save 3; {FULL}", "complete"]) == 0
    assert len(scene.launched) == 2


def test_a_gpu_that_runs_out_of_memory_again_does_not_fit(scene: Scene) -> None:
    """Also where another fault lies between, and checkpoints were made."""
    launches = [f"save 3; {FULL}", f"save 6; {KILLED}", f"save 9; {FULL}", "complete"]
    assert scene.play(launches) == 3
    assert len(scene.launched) == 3
    assert scene.report.count("the run failed") == 3
    assert scene.state["code"] == 3


def test_the_owner_hears_of_what_ranks_say_of_the_restart_and_of_the_end(scene: Scene) -> None:
    assert scene.play([f"notice spike step 2: loss leaps; save 3; {KILLED}", "complete"]) == 0
    assert [kind for kind, _ in scene.notices] == ["spike", "restart", "end"]
    sentences = dict(scene.notices)
    assert sentences["spike"] == "step 2: loss leaps"
    assert sentences["restart"].startswith("rank 1 on king was killed by SIGKILL; restart 1 of 5")
    assert "the checkpoint of step 3" in sentences["end"]


def test_the_owner_hears_of_a_failure_once_and_how_to_go_on(scene: Scene) -> None:
    assert scene.play(["fail 65 the loss is not finite; exit 65"]) == 65
    ((kind, sentence),) = scene.notices
    assert kind == "failure"
    assert "the loss is not finite; exit code 65; there is no checkpoint" in sentence
    assert sentence.endswith("to go on: the same command again")


def test_a_kind_of_notice_that_the_launcher_does_not_know_ends_nothing(scene: Scene) -> None:
    assert scene.play(["notice newer something; complete"]) == 0


def test_the_owner_hears_of_a_full_disk_and_of_a_run_that_nothing_starts_again(scene: Scene) -> None:
    disk = "notice disk the_disk_is_full; "
    scene.play([disk + KILLED, KILLED, KILLED], budget=1)
    assert [kind for kind, _ in scene.notices] == ["disk", "restart", "failure"]
    sentence = scene.notices[-1][1]
    assert sentence.startswith("rank 1 on king was killed by SIGKILL; exit code ")
    assert sentence.endswith("to go on: the same command again")
