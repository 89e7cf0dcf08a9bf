"""What is missing on a machine is done over ssh, each command said before it runs; one that is ready is left alone.

A fake ssh and a fake ssh-copy-id play the machines: each is a folder, with the words that were sent to it.
"""

from __future__ import annotations

import json
import os
import plistlib
import subprocess
from pathlib import Path

import pytest
from support.mpi import ROOT

from mlx_empire.cluster.hostfile import parse_hostfile
from mlx_empire.setup import command, steps
from mlx_empire.setup.launchd import job

CODE = {"mlx": "0.32.4", "package": "a" * 64}
SSH = """\
#!/bin/sh
while case $1 in -*) true;; *) false;; esac; do shift 2; done
there={folder}/$1
echo "$2" >> $there.asked
test -e $there.key || {{ echo "Permission denied (publickey)." >&2; exit 255; }}
case "$2" in
  true) ;;
  *setup.code*) cat $there.code 2>/dev/null || exit 1;;
  *"tar -xf"*) cat > $there.tar;;
  *"make setup"*) test -e $there.tar && cp {folder}/own $there.code;;
esac
"""
COPY_ID = """\
#!/bin/sh
touch {folder}/$1.key
"""


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone of a repository with a hostfile of three machines, of which one is ready."""
    (tmp_path / "bin").mkdir()
    for name, text in (("ssh", SSH), ("ssh-copy-id", COPY_ID)):
        (tmp_path / "bin" / name).write_text(text.format(folder=tmp_path))
        (tmp_path / "bin" / name).chmod(0o700)
    (tmp_path / "own").write_text(json.dumps(CODE))
    (tmp_path / "ready.invalid.key").touch()
    (tmp_path / "ready.invalid.code").write_text(json.dumps(CODE))
    (tmp_path / "old.invalid.key").touch()
    (tmp_path / "old.invalid.code").write_text(json.dumps(CODE | {"package": "b" * 64}))
    (tmp_path / "hosts.txt").write_text("localhost\nready.invalid\nold.invalid\nnew.invalid\n")
    clone = tmp_path / "clone"
    clone.mkdir()
    subprocess.run(["git", "init", "-q", str(clone)], check=True)
    (clone / "kept.py").write_text("")
    (clone / "secret.txt").write_text("not in git")
    subprocess.run(["git", "-C", str(clone), "add", "kept.py"], check=True)
    monkeypatch.chdir(clone)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/id_ed25519.pub").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    for name in ("PRTE_MCA_plm_ssh_agent", "OMPI_MCA_plm_rsh_agent"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("mlx_empire.setup.code.own_code", lambda: CODE)
    return tmp_path


def lines(printed: str) -> list[str]:
    return [line.strip() for line in printed.splitlines() if line.startswith("  ")]


def test_what_is_missing_is_done_and_what_is_ready_is_left_alone(
    machines: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(machines / "hosts.txt"), "--dry-run"]) == 0
    planned = lines(capfd.readouterr().out)
    assert not (machines / "old.invalid.tar").exists()
    assert not (machines / "new.invalid.key").exists()
    assert command.main([str(machines / "hosts.txt")]) == 0
    assert lines(capfd.readouterr().out) == planned
    assert planned[2] == "ssh-copy-id new.invalid"
    assert [line.split(" | ")[0] for line in planned] == [
        "git ls-files -z",
        f"ssh old.invalid 'cd {machines}/clone && make setup'",
        "ssh-copy-id new.invalid",
        "git ls-files -z",
        f"ssh new.invalid 'cd {machines}/clone && make setup'",
    ]
    assert not any(
        "tar" in line or "make" in line for line in (machines / "ready.invalid.asked").read_text().split()
    )
    for name in ("old", "new"):
        sent = subprocess.run(
            ["tar", "-tf", str(machines / f"{name}.invalid.tar")], capture_output=True, text=True
        )
        assert sent.stdout.split() == ["kept.py"]  # what git does not know stays here
    assert command.main([str(machines / "hosts.txt")]) == 0
    assert capfd.readouterr().out == "every machine is ready\n"


def test_on_macs_it_offers_what_lets_a_run_survive_a_house(
    machines: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On each machine the exclusion from Time Machine and from Spotlight; and the job that repeats the launch."""
    monkeypatch.setattr("sys.platform", "darwin")
    command._offer(parse_hostfile("localhost\nme@new.invalid port=2222\n", "hosts").nodes)
    told = capsys.readouterr().out
    here, there = (line.strip() for line in lines(told))
    runs = f"{machines}/clone/runs"
    words = f"mkdir -p {runs} && tmutil addexclusion {runs} && touch {runs}/.metadata_never_index"
    assert here == words
    assert there == f"ssh -t -p 2222 me@new.invalid '{words}'"
    assert "--launchd RECIPE prints a job for launchd" in told


def test_a_machine_that_stays_as_it_was_is_named(machines: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (machines / "own").write_text(json.dumps(CODE | {"package": "b" * 64}))
    with pytest.raises(SystemExit, match="75"):
        command.main([str(machines / "hosts.txt")])
    assert "old.invalid: the code there is still another one" in capfd.readouterr().err


def test_a_step_that_fails_ends_it_with_the_line_that_failed(
    machines: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (machines / "bin/ssh-copy-id").write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(SystemExit, match="75"):
        command.main([str(machines / "hosts.txt")])
    assert "new.invalid: this ended with exit code 9: ssh-copy-id new.invalid" in capfd.readouterr().err
    assert not (machines / "new.invalid.tar").exists()


def test_a_machine_without_a_key_of_its_own_makes_one_first(tmp_path: Path) -> None:
    step = steps.key_step(tmp_path)
    assert step is not None
    assert step.line.startswith("ssh-keygen ")
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/id_rsa.pub").touch()
    assert steps.key_step(tmp_path) is None


def test_outside_a_clone_nothing_can_be_copied(machines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(machines)
    with pytest.raises(SystemExit, match="64"):
        command.main([str(machines / "hosts.txt")])


@pytest.mark.parametrize(("code", "again"), [(0, 0), (3, 0), (64, 0), (75, 1), (143, 0)])
def test_the_job_is_repeated_only_where_that_makes_sense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, again: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$@" > said; exit {code}\n')
    (tmp_path / "python").chmod(0o700)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    made = plistlib.loads(job(Path("hosts/empire.txt"), ROOT / "recipes/scout.yaml"))
    assert made["WorkingDirectory"] == str(tmp_path)
    assert made["KeepAlive"] == {"SuccessfulExit": False}
    assert subprocess.run(made["ProgramArguments"], check=False).returncode == again
    assert (
        tmp_path / "said"
    ).read_text() == f"-m mlx_empire.launch hosts/empire.txt {ROOT}/recipes/scout.yaml\n"
    (tmp_path / "said").unlink()
    (tmp_path / "runs/scout").mkdir(parents=True)
    (tmp_path / "runs/scout/COMPLETE").touch()
    assert subprocess.run(made["ProgramArguments"], check=False).returncode == 0
    assert not (tmp_path / "said").exists()
