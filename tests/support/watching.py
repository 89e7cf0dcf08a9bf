"""Runs a worker under `watch.cpp` and reads what it saw: kinds of nodes, waits between streams, evaluations."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import pytest

SOURCE = Path(__file__).with_name("watch.cpp")
PACKAGE = Path(mx.__file__).parent


@dataclass(frozen=True)
class Kind:
    """Nodes of one primitive on one stream with the same dtypes: how many, the largest of their arrays, and the bytes
    of all of them."""

    primitive: str
    stream: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    count: int
    elements: int
    buffers: int
    bytes: int


@dataclass(frozen=True)
class Seen:
    """What was evaluated: `waits` holds (node, what it waits for), each as primitive@stream; evaluations with work, and
    how often the main thread stopped for one."""

    kinds: tuple[Kind, ...]
    waits: tuple[tuple[str, str], ...]
    blocking: int
    asynchronous: int
    stops: int


@dataclass
class Watch:
    """What was seen since the last report. Only in a process that was started with the library."""

    seen: list[Seen] = field(default_factory=list)

    @contextmanager
    def during(self) -> Iterator[None]:
        """What is evaluated within it becomes the last of `seen`."""
        _report()
        yield
        self.seen.append(_report())


def evaluations() -> tuple[int, int, int]:
    """Evaluations that had work so far, blocking and asynchronous ones; how often the main thread stopped for one."""
    counts = (ctypes.c_long * 3)()
    ctypes.CDLL(None).watch_counts(counts)
    return counts[0], counts[1], counts[2]


def library(folder: Path) -> Path:
    """The compiled library, in `folder` from the last time; skips the test where there is no compiler, or on a Mac."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if sys.platform != "linux" or compiler is None:
        pytest.skip("the watch over evaluations takes Linux and a C++ compiler")
    name = hashlib.sha256(SOURCE.read_bytes() + f"{mx.__version__} {PACKAGE}".encode()).hexdigest()[:16]
    built = folder / f"watch-{name}.so"
    if not built.exists():
        link = [f"-L{PACKAGE / 'lib'}", "-lmlx", f"-Wl,-rpath,{PACKAGE / 'lib'}"]
        made = built.with_suffix(f".{os.getpid()}")
        command = [compiler, "-std=c++20", "-O1", "-Wall", "-shared", "-fPIC", f"-I{PACKAGE / 'include'}"]
        subprocess.run([*command, "-o", str(made), str(SOURCE), *link], check=True)
        made.replace(built)
    return built


def watched(built: Path, program: list[str], timeout: float = 300) -> str:
    """What `program`, started under the library, prints."""
    preload = " ".join(filter(None, [str(built), os.environ.get("LD_PRELOAD")]))
    environment = os.environ | {"LD_PRELOAD": preload, "PYTHONPATH": str(SOURCE.parent.parent)}
    ended = subprocess.run(
        [sys.executable, *program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def _report() -> Seen:
    with tempfile.NamedTemporaryFile("r") as file:
        assert ctypes.CDLL(None).watch_report(file.name.encode()) == 0
        lines = [line.rstrip("\n").split("\t") for line in file]
    kinds, waits, worked = [], [], (0, 0, 0)
    for what, *rest in lines:
        if what == "worked":
            worked = (int(rest[0]), int(rest[1]), int(rest[2]))
        elif what == "wait":
            waits.append((rest[0], rest[1]))
        else:
            name, stream, inputs, outputs, *numbers = rest
            read = [tuple(filter(None, dtypes.split(","))) for dtypes in (inputs, outputs)]
            kinds.append(Kind(name, int(stream), *read, *map(int, numbers)))
    return Seen(tuple(kinds), tuple(waits), *worked)
