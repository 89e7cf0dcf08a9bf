"""Decides whether a person watches the output live, and how large that terminal is.

`isatty` cannot tell under mpirun: Open MPI gives every rank a pseudo-terminal of its own as standard output,
also where mpirun itself writes to a file, and copies what arrives there. What counts is where the launcher's
standard output goes: the launcher is the parent of a rank on the machine where it was typed, and elsewhere a
daemon that writes to nothing.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


def terminal_size(stream: TextIO) -> os.terminal_size | None:
    """Columns and lines of the terminal where `stream` ends up; None for a file, a pipe, a dumb terminal."""
    if os.environ.get("TERM", "dumb") == "dumb":
        return None
    try:
        own = stream.fileno()
        if not os.isatty(own):
            return None
        if "PMIX_RANK" not in os.environ:  # set by Open MPI's launcher for each rank
            return _size(own)
        with _launchers_output(os.getppid()) as launchers:
            # A shell between the launcher and this process shares our own pseudo-terminal and tells nothing.
            shared = os.path.samestat(os.fstat(launchers), os.fstat(own))
            return None if shared or not os.isatty(launchers) else _size(launchers)
    except (OSError, ValueError):  # no descriptor, no such file, no lsof: nobody is known to watch
        return None


def _size(descriptor: int) -> os.terminal_size:
    size = os.get_terminal_size(descriptor)
    return size if size.columns and size.lines else os.terminal_size((80, 24))


@contextmanager
def _launchers_output(process: int) -> Iterator[int]:
    """A descriptor of what `process` has as standard output, opened for reading only."""
    descriptor = os.open(_output_path(process), os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _output_path(process: int) -> str:
    """The name of a process's standard output: in /proc on Linux, from lsof on macOS."""
    if sys.platform == "linux":
        return f"/proc/{process}/fd/1"
    command = ["lsof", "-a", "-p", str(process), "-d", "1", "-F", "n"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except subprocess.TimeoutExpired as error:
        raise OSError("lsof does not answer") from error
    names = [line[1:] for line in answer.splitlines() if line.startswith("n/")]
    if not names:
        raise OSError(f"lsof does not know the output of process {process}")
    return names[0]
