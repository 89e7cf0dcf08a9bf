"""The lock of a run's folder: one holder, named; holders elsewhere; folders that hold other things."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_empire.errors import UserError
from mlx_empire.run.lock import LAUNCHER, RUN, RunLock, is_held, read_holder


def left_behind(folder: Path, text: str, age: float = 0.0) -> Path:
    """A lock file that nobody holds, touched `age` seconds ago."""
    file = folder / "LOCK"
    file.write_text(text)
    os.utime(file, (time.time() - age, time.time() - age))
    return file


def holder(host: str) -> str:
    return json.dumps({"host": host, "pid": 4711, "since": "2026-01-02T03:04:05+00:00"})


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        assert lock.note is None
        own = read_holder(tmp_path)
        assert own is not None
        assert (own.host, own.pid) == (socket.gethostname(), os.getpid())
        with pytest.raises(
            UserError, match=rf"is in use by process {own.pid} on {own.host}, since {own.since[:10]}"
        ):
            RunLock(tmp_path)
        assert read_holder(tmp_path) == own, "a refused launch changes nothing"
    assert list(tmp_path.iterdir()) == []


def test_the_lock_goes_with_its_process(tmp_path: Path) -> None:
    program = (
        "import os, pathlib; from mlx_empire.run.lock import RunLock;"
        f"lock = RunLock(pathlib.Path({str(tmp_path)!r})); print(os.getpid(), flush=True); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 9
    with RunLock(tmp_path) as lock:
        assert lock.note is not None
        assert f"left by process {done.stdout.strip()} on {socket.gethostname()}" in lock.note


def test_a_holder_elsewhere_counts_while_it_touches_its_file(tmp_path: Path) -> None:
    left_behind(tmp_path, holder("king"), age=30)
    with pytest.raises(UserError, match=r"process 4711 on king, since 2026.*touched (29|30|31) s ago"):
        RunLock(tmp_path, stale_seconds=60)
    assert {file.name for file in tmp_path.iterdir()} == {"LOCK"}
    with RunLock(tmp_path, stale_seconds=20) as lock:
        assert lock.note is not None
        assert "process 4711 on king" in lock.note


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"host": 3}', "\x00" * 9000, "[" * 4000])
def test_a_lock_that_cannot_be_read_is_taken_over(tmp_path: Path, text: str) -> None:
    left_behind(tmp_path, text)
    with RunLock(tmp_path) as lock:
        assert (lock.note is not None) == bool(text)


def test_a_link_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    target = tmp_path / "precious"
    target.write_text("keep")
    (tmp_path / "run" / "LOCK").symlink_to(target)
    with pytest.raises(UserError, match=r"run\.dir"):
        RunLock(tmp_path / "run")
    assert target.read_text() == "keep"


def test_a_folder_with_other_things_stays(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        (tmp_path / "run" / "metrics.jsonl").touch()
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_the_lock_of_a_living_run_does_not_hold_up_a_copy_of_its_folder(tmp_path: Path) -> None:
    """Wherever that run is: the copied file is as fresh as the original."""
    original, copy, elsewhere = (tmp_path / name for name in ("original", "copy", "elsewhere"))
    with RunLock(original):
        for host in (socket.gethostname(), "king"):
            text = json.loads((original / "LOCK").read_text()) | {"host": host}
            copy.mkdir()
            left_behind(copy, json.dumps(text))
            with RunLock(copy) as lock:
                assert lock.note is not None
                assert f"was copied from where process {os.getpid()} on {host}" in lock.note
            copy.rmdir()
        with pytest.raises(UserError, match="is in use by process"):
            RunLock(original)
        elsewhere.symlink_to(original)
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()}"):
            RunLock(elsewhere)


def test_the_file_that_a_holder_elsewhere_locked_is_no_copy(tmp_path: Path) -> None:
    file = left_behind(tmp_path, "", age=30)
    text = json.loads(holder("king")) | {"file": file.stat().st_ino}
    left_behind(tmp_path, json.dumps(text), age=30)
    with pytest.raises(UserError, match="process 4711 on king"):
        RunLock(tmp_path, stale_seconds=60)


def test_a_launcher_and_its_run_hold_one_folder_each_once(tmp_path: Path) -> None:
    with RunLock(tmp_path, LAUNCHER), RunLock(tmp_path, RUN):
        assert is_held(tmp_path, LAUNCHER)
        assert is_held(tmp_path, RUN)
        with pytest.raises(UserError, match=r"is in use by process .*mlx-empire status"):
            RunLock(tmp_path, LAUNCHER)
        with pytest.raises(UserError, match=r"is in use by process .*wait for it"):
            RunLock(tmp_path, RUN)
    assert not is_held(tmp_path, LAUNCHER)
    assert not is_held(tmp_path, RUN)


def test_a_launcher_s_lock_stays_as_an_empty_file_for_earlier_versions(tmp_path: Path) -> None:
    """They open it, lock what they opened, and do not look whether it still has its name."""
    with RunLock(tmp_path, LAUNCHER):
        earlier = os.open(tmp_path / "launch.lock", os.O_RDWR | os.O_CREAT, 0o600)
        with pytest.raises(BlockingIOError):
            fcntl.flock(earlier, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(earlier, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (tmp_path / "launch.lock").read_bytes() == b""
    assert is_held(tmp_path, LAUNCHER)
    with pytest.raises(UserError, match="is in use by another process"):
        RunLock(tmp_path, LAUNCHER)
    os.close(earlier)
    with RunLock(tmp_path, LAUNCHER) as lock:
        assert lock.note is None


def test_to_look_at_a_lock_makes_no_file_and_follows_no_link(tmp_path: Path) -> None:
    assert not is_held(tmp_path, LAUNCHER)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "other").touch()
    (tmp_path / "launch.lock").symlink_to(tmp_path / "other")
    with (tmp_path / "other").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert not is_held(tmp_path, LAUNCHER)
