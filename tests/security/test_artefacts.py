"""What a run leaves behind and shows: no secret of the environment, nothing that others may read, no open door.

One run of two ranks with checkpoints under the most careless umask; a run that fails with a traceback; and one whose
ranks print their stacks.
"""

from __future__ import annotations

import os
import secrets
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.mpi import mpirun, rank_environment
from train.launching import Workspace

CANARY = f"canary-{secrets.token_hex(12)}"
SECRETS = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "GITHUB_TOKEN", "DATABASE_URL", "MY_PASSWORD")


@dataclass
class Seen:
    """How the commands ended, and what sockets the ranks of the long one listened on."""

    codes: list[int]
    output: bytes
    listening: set[str]
    ranks: set[int]


def train(workspace: Workspace, *settings: str, ranks: int, fault: str = "") -> subprocess.Popen[bytes]:
    """Starts a run with secrets in the environment."""
    environment = rank_environment(str(workspace.folder)) | dict.fromkeys(SECRETS, CANARY)
    environment |= {"MLX_EMPIRE_CACHE": str(workspace.folder / "cache"), "MLX_EMPIRE_FAULT": fault}
    # On one machine Open MPI needs no network between ranks.
    launcher = [mpirun(), "--oversubscribe", "--mca", "btl", "self,sm", "-n", str(ranks)] if ranks else []
    return subprocess.Popen(
        [*launcher, sys.executable, "-m", "mlx_empire.train", "recipe.yaml", *settings],
        cwd=workspace.folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        umask=0,
    )


def ranks_of(word: str) -> Iterator[int]:
    """Process ids of Python processes with `word` among their arguments."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if word.encode() in arguments and b"python" in Path(arguments[0].decode()).name.encode():
                yield int(entry.name)


def listening(pids: set[int]) -> set[str]:
    """Addresses (as /proc/net has them) on which any of the processes listens."""
    own = set()
    for pid in pids:
        try:
            own |= {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in own:
                found.add(words[1])
    return found


@pytest.fixture(scope="module")
def seen(workspace: Workspace) -> Seen:
    pytest.importorskip("resource")
    linux = sys.platform == "linux"
    process = train(workspace, "run.dir=whole", "run.save_every=1", "run.eval_every=2", ranks=2)
    open_doors, ranks = set(), set()
    while process.poll() is None:
        if linux:
            now = set(ranks_of("run.dir=whole"))
            ranks |= now
            open_doors |= listening(now)
        time.sleep(0.1)
    assert process.stdout is not None
    codes, output = [process.returncode], process.stdout.read()
    others = [
        train(workspace, "run.dir=fails", ranks=0, fault="step=2;phase=forward;action=raise"),
        train(
            workspace, "run.dir=hangs", "comm.deadline_seconds=2", ranks=0,
            fault="step=2;phase=forward;action=delay;seconds=60",
        ),
    ]  # fmt: skip
    for other in others:
        output += other.communicate(timeout=120)[0]
        codes.append(other.returncode)
    return Seen(codes, output, open_doors, ranks)


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_runs_ended_as_they_should(seen: Seen, workspace: Workspace) -> None:
    assert seen.codes == [0, 70, 75], seen.output.decode(errors="replace")[-4000:]
    assert b"InjectedError" in seen.output
    assert b"---- stacks of rank 0" in seen.output
    assert len(list((workspace.folder / "whole" / "checkpoints").glob("step-*"))) == 3


def test_no_secret_gets_out(seen: Seen, workspace: Workspace) -> None:
    assert CANARY.encode() not in seen.output
    files = files_of(workspace.folder)
    assert len(files) > 15
    assert [file for file in files if CANARY.encode() in file.read_bytes()] == []
    assert [file for file in files if CANARY in file.name] == []


@pytest.mark.parametrize("folder", ["whole", "fails", "hangs", "cache"])
def test_nobody_else_may_read_what_a_run_wrote(seen: Seen, workspace: Workspace, folder: str) -> None:
    top = workspace.folder / folder
    paths = [top, *top.rglob("*")]
    modes = {str(path.relative_to(top)): stat.S_IMODE(path.stat().st_mode) for path in paths}
    expected = {str(path.relative_to(top)): 0o700 if path.is_dir() else 0o600 for path in paths}
    assert modes == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_rank_listens(seen: Seen) -> None:
    """mpirun's own daemon listens, and between machines Open MPI's TCP does: see docs/limits.md."""
    assert len(seen.ranks) >= 2  # and what they fork for a moment
    assert seen.listening == set()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_listening_process_is_seen() -> None:
    program = "import socket, sys; s = socket.create_server(('', 0)); print(s.getsockname()[1], flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program, "a-door"], stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert set(ranks_of("a-door")) == {process.pid}
        assert listening({process.pid}) == {f"00000000:{port:04X}"}
        process.kill()
