"""`terminal_size` before pseudo-terminals of our own, and before Open MPI's launcher itself."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
from support.mpi import mpirun, rank_environment

from mlx_empire.report import text
from mlx_empire.report.text import terminal_size


@pytest.fixture
def screen(monkeypatch):
    """Opens pseudo-terminals of 97 columns: (reading end, name of the writing end)."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("PMIX_RANK", raising=False)
    opened = []

    def open_one(columns: int = 97) -> tuple[int, str]:
        ours, theirs = pty.openpty()
        opened.extend((ours, theirs))
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 31, columns, 0, 0))
        return ours, os.ttyname(theirs)

    yield open_one
    for descriptor in opened:
        os.close(descriptor)


def test_a_terminal_a_file_and_no_descriptor(screen, tmp_path, monkeypatch):
    _, name = screen()
    with open(name, "w") as stream:
        assert terminal_size(stream) == (97, 31)
        monkeypatch.setenv("TERM", "dumb")
        assert terminal_size(stream) is None
    monkeypatch.setenv("TERM", "xterm")
    with open(tmp_path / "log", "w") as stream:
        assert terminal_size(stream) is None
    assert terminal_size(io.StringIO()) is None


def test_a_terminal_that_does_not_know_its_size(screen):
    _, name = screen(columns=0)
    with open(name, "w") as stream:
        assert terminal_size(stream) == (80, 24)


def test_under_a_launcher_its_output_counts(screen, tmp_path, monkeypatch):
    monkeypatch.setenv("PMIX_RANK", "0")
    _, rank = screen(columns=0)
    _, launcher = screen(columns=120)
    log = tmp_path / "log"
    log.touch()
    with open(rank, "w") as stream:
        for output, expected in [(launcher, (120, 31)), (str(log), None), (rank, None), ("/dev/null", None)]:
            monkeypatch.setattr(text, "_output_path", lambda process, output=output: output)
            assert terminal_size(stream) == expected, output


def test_on_macos_lsof_names_the_launchers_output(screen, tmp_path, monkeypatch):
    _, name = screen()
    lsof = tmp_path / "lsof"
    lsof.write_text(f"#!/bin/sh\ntest \"$3\" = 4321 && printf 'p4321\\nf1\\nn{name}\\n'\n")
    lsof.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert text._output_path(4321) == name
    with pytest.raises(OSError, match="1234"):
        text._output_path(1234)


PROGRAM = """
import sys
from mlx_empire.report.text import terminal_size
size = terminal_size(sys.stdout)
print(sys.stdout.isatty(), size.columns if size else None, flush=True)
"""


def test_under_mpirun_on_a_terminal_and_into_a_file(screen, tmp_path):
    environment = rank_environment(str(tmp_path), {"TERM": "xterm"})
    command = [mpirun(), "-n", "1", sys.executable, "-c", PROGRAM]

    def launch(output: int) -> None:
        subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, env=environment, timeout=60, check=True
        )

    with open(tmp_path / "log", "wb") as log:
        launch(log.fileno())
    # Open MPI makes a rank believe that it writes to a terminal; this is why asking it is not enough.
    assert (tmp_path / "log").read_text() == "True None\n"
    ours, name = screen()
    with open(name, "wb", buffering=0) as theirs:
        launch(theirs.fileno())
    assert os.read(ours, 100).decode().split() == ["True", "97"]
