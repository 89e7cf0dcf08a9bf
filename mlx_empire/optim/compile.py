"""Decides whether element-wise functions are fused by `mx.compile` or run operation by operation.

On a GPU they always are. MLX on a Linux CPU calls `g++` at run time, so there they are fused where it is on
PATH. The choice depends on the machine alone, never on the number of ranks. Fused functions hold element-wise
operations only: views and reductions end a kernel.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_empire.disk import open_private


def may_compile() -> bool:
    """True where `mx.compile` works without anything being installed."""
    return mx.default_device().type == mx.DeviceType.gpu or _cpu_may_compile()


@cache
def _cpu_may_compile() -> bool:
    # On macOS /usr/bin/g++ exists even without the developer tools and then only opens a dialog.
    return sys.platform.startswith("linux") and shutil.which("g++") is not None


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate an element-wise function of arrays: one kernel where that is possible.

    It is traced for every shape: a trace for any shape holds a broadcast before each operation, and those count
    towards the 11 operations in a row after which MLX begins another kernel.
    """
    compiled = mx.compile(function)

    @wraps(function)
    def call(*arrays: mx.array) -> Any:
        return compiled(*arrays) if may_compile() else function(*arrays)

    return call


@contextmanager
def compiling_alone() -> Iterator[None]:
    """Keep other processes of this user on this machine from compiling meanwhile.

    MLX's CPU backend writes its kernels into a folder shared by all processes and takes a file that exists
    for a finished one; without this, one of several new ranks may load what another is still writing.
    """
    if mx.default_device().type == mx.DeviceType.gpu or not _cpu_may_compile():
        yield
        return
    lock = open_private(Path(tempfile.gettempdir()) / f"mlx_empire-compile-{os.getuid()}.lock")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)  # which lets go of it
