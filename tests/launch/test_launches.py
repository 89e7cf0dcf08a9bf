"""Real launches of real ranks: what dies is named, what can go on goes on, and nothing else counts as success."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from launch.launching import Launching, fault, note_failure
from support.mpi import ROOT
from train.launching import curve, raw_tensors

from mlx_empire.launch import command as launch

FAULT = "MLX_EMPIRE_FAULT"


@pytest.fixture
def launching(tmp_path: Path) -> Launching:
    return Launching(tmp_path)


@pytest.mark.faults
def test_two_lost_ranks_are_named_and_the_run_completes(launching: Launching, tmp_path: Path) -> None:
    """K3: exit(0) in a rank and a segmentation fault in another, one launch after the other."""
    faults = [
        fault("backward", "exit0", tmp_path / "first"),
        fault("optimizer", "segv", tmp_path / "second", rank=0),
    ]
    canary = {"HF_TOKEN": "canary-of-the-test"}
    ended = launching.launch("run.steps=3", env={FAULT: " ".join(faults)} | canary)
    assert ended.code == 0, ended.stderr
    host = os.uname().nodename
    first, second = ended.reports
    assert f"rank 1 on {host} left before the run was complete (exit code 0)" in first
    assert "where  backward" in first
    assert "step 2" in first
    assert f"rank 0 on {host} was killed by SIGSEGV" in second
    assert "where  optimizer" in second
    assert "step 2" in first
    assert "step 2" in second
    assert "-m mlx_empire.launch hosts.txt recipe.yaml" in second
    assert "prterun" not in ended.stderr, "Open MPI's announcements are told once, by the report"
    assert "@mlx_empire" not in ended.stderr
    assert len(curve(launching.run)) == 3
    assert raw_tensors(launching.run / "final")
    artefacts = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(b"canary-of-the-test" in content for content in artefacts)
    assert "canary-of-the-test" not in ended.stdout + ended.stderr
    assert {file.stat().st_mode & 0o777 for file in launching.run.glob("launch.*")} == {0o600}


@pytest.mark.faults
@pytest.mark.parametrize("phase", ["load", "data", "forward", "backward", "reduce", "optimizer", "finish"])
def test_an_exception_is_told_once_and_never_retried(launching: Launching, phase: str) -> None:
    """K2: the first failing rank's traceback once; no hang."""
    step = {"load": 0, "finish": 3}.get(phase, 2)
    ended = launching.launch("run.steps=3", env={FAULT: fault(phase, "raise", step=step)})
    assert ended.code == 70
    assert ended.stderr.count("Traceback (most recent call last)") == 1, ended.stderr
    (report,) = ended.reports
    assert f"internal error: mlx_empire.faults.InjectedError: injected in {phase}" in report
    assert "rank 1 on" in report
    assert "no checkpoint" in report
    assert not (launching.run / "COMPLETE").exists()


@pytest.mark.faults
def test_an_exit_code_that_no_rank_explained_is_a_lost_rank(launching: Launching, tmp_path: Path) -> None:
    """K3: exit(3) is not "does not fit"."""
    exits = fault("forward", "exit3", tmp_path / "once", step=4)
    ended = launching.launch("run.steps=5", "run.save_every=1", env={FAULT: exits})
    assert ended.code == 0
    assert "left before the run was complete (exit code 3)" in ended.reports[0]
    struck = (tmp_path / "once").stat().st_mtime
    note_failure(launching, "a rank leaves in the middle", "exit(3) in forward", struck)


@pytest.mark.faults
def test_a_rank_that_hangs_is_ended_and_the_run_goes_on(launching: Launching, tmp_path: Path) -> None:
    """H1: a stopped process is found by its deadline, named, killed although it does not listen, and replaced."""
    hang = fault("forward", "stop", tmp_path / "once", step=3)
    settings = ["run.steps=4", "run.save_every=1", "comm.deadline_seconds=8"]
    ended = launching.launch(*settings, env={FAULT: hang})
    assert ended.code == 0, ended.stderr
    (report,) = ended.reports
    assert f"what   rank 1 on {os.uname().nodename}: no sign of life for" in report
    assert "where  forward" in report, report
    assert "step 3" in report
    assert "the checkpoint of step" in report
    assert "---- stacks of rank 0" in ended.stderr
    assert "going on after step" in ended.stdout
    struck = (tmp_path / "once").stat().st_mtime
    note_failure(launching, "a rank stopped, deadline 8 s", "SIGSTOP in forward", struck)


@pytest.mark.faults
def test_a_crash_loop_is_stopped(launching: Launching) -> None:
    """K4: the same rank dies again right after each restart."""
    ended = launching.launch("run.steps=3", "--restarts", 9, env={FAULT: fault("forward", "kill")})
    assert ended.code == 75
    assert len(ended.reports) == 3
    assert "no progress between restarts" in ended.stderr
    assert launching.state()["code"] == 75


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["hosts.txt", "recipe.yaml", "run.stepps=3"], 64, "run.stepps"),
        (["nowhere.txt", "recipe.yaml"], 64, "nowhere.txt"),
        (["evil.txt", "recipe.yaml"], 64, "evil.txt:1: '-oProxyCommand=x' is not a host name"),
        (["hosts.txt", "recipe.yaml", "--restarts", "-1"], 64, "--restarts -1"),
        (["hosts.txt", "recipe.yaml", "--forward", "NOT_THERE"], 64, "NOT_THERE"),
        (["hosts.txt"], 64, "hosts.txt:1"),
        (["recipe.yaml"], 64, "--hosts"),
        (["status", "nowhere"], 64, "nowhere"),
        (["attach", "."], 64, "--detach"),
        (["stop", "."], 64, "no launcher"),
        (["gone.txt", "recipe.yaml"], 75, "unreachable.invalid"),
        (["far.txt", "recipe.yaml"], 64, "far.txt:1: king.invalid: start the run on this machine"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_launched_or_written(
    launching: Launching,
    words: list[str],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (launching.folder / "evil.txt").write_text("-oProxyCommand=x slots=1\n")
    (launching.folder / "gone.txt").write_text("localhost\nunreachable.invalid\n")
    (launching.folder / "far.txt").write_text("king.invalid\nlocalhost\n")
    before = sorted(launching.folder.iterdir())
    monkeypatch.chdir(launching.folder)
    monkeypatch.delenv(FAULT, raising=False)
    with pytest.raises(SystemExit) as ended:
        launch.main(words)
    assert ended.value.code == code
    stderr = capsys.readouterr().err
    assert said in stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert sorted(launching.folder.iterdir()) == before


def test_a_finished_run_is_not_started_again(
    launching: Launching, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launching.run.mkdir()
    (launching.run / "COMPLETE").touch()
    monkeypatch.chdir(launching.folder)
    with pytest.raises(SystemExit) as ended:
        launch.main(["hosts.txt", "recipe.yaml"])
    assert ended.value.code == 64
    assert "finished run" in capsys.readouterr().err


def test_the_printed_line_starts_nothing(
    launching: Launching, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(launching.folder)
    assert launch.main(["hosts.txt", "recipe.yaml", "--dry-run", "--interface", "en0"]) == 0
    stdout = capsys.readouterr().out
    assert f"-hostfile {launching.folder}/hosts.txt" in stdout
    assert "btl_tcp_if_include en0" in stdout
    assert not launching.run.exists()


def test_the_quickstart_can_be_launched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert launch.main(["hosts/local.txt", "recipes/quickstart.yaml", "--dry-run"]) == 0
    line = capsys.readouterr().out
    assert f"-hostfile {ROOT}/hosts/local.txt" in line
    assert "--oversubscribe" in line
