"""Output passes through untouched, and a command sees a terminal where there is one, as large as it is."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import tty

import pytest

from mlx_empire.launch.process import PassedOn

LOOK = "import os; print(os.isatty(1), *(os.get_terminal_size(1) if os.isatty(1) else ()), sep=' ', end='\\r\\n')"


def look(ours: int, heard: list[bytes]) -> None:
    """Run a command that says what its output is."""
    output = PassedOn(ours, heard.append)
    process = subprocess.Popen([sys.executable, "-c", LOOK], stdout=output.theirs)
    output.start()
    assert process.wait(30) == 0
    output.finish(10)


def test_a_pipe_stays_a_pipe() -> None:
    read, write = os.pipe()
    heard: list[bytes] = []
    look(write, heard)
    os.close(write)
    assert os.read(read, 1000) == b"".join(heard) == b"False\r\n"
    os.close(read)


def test_a_terminal_stays_a_terminal_of_that_size() -> None:
    master, slave = pty.openpty()
    tty.setraw(slave)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 31, 117, 0, 0))
    heard: list[bytes] = []
    look(slave, heard)
    shown = b""
    while not shown.endswith(b"h"):
        shown += os.read(master, 1000)
    assert b"".join(heard) == b"True 117 31\r\n"
    assert shown == b"".join(heard) + b"\x1b[0m\x1b[?25h"
    os.close(slave)
    os.close(master)


def test_a_reader_that_left_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    heard: list[bytes] = []
    look(write, heard)
    os.close(write)
    assert b"".join(heard) == b"False\r\n"
