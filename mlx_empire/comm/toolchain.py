"""Decides which compiler MLX finds on Linux, and says what computes there: two things that have no version of MLX's.

`make setup` puts a g++ beside the interpreter that compiles fused kernels for this very CPU (`benchmarks/fast_gxx.sh`),
and a library for LD_PRELOAD by which OpenBLAS multiplies matrices (`benchmarks/fast_blas.c`). macOS has neither.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path


def prefer_own_compiler() -> None:
    """Put the environment's folder of programs first on PATH where it has a g++, however this process was started."""
    beside = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    has_one = sys.prefix != sys.base_prefix and (Path(beside) / "g++").exists()
    if has_one and path.split(os.pathsep)[0] != beside:
        os.environ["PATH"] = os.pathsep.join([beside, path])


def toolchain() -> dict[str, str | None]:
    """What multiplies matrices, and the flags for fused kernels; nothing but on Linux."""
    if not sys.platform.startswith("linux"):
        return {}
    return {"matrix products": _products(), "fused kernels": _flags()}


def _products() -> str:
    """The preloaded library that answers for cblas."""
    for library in os.environ.get("LD_PRELOAD", "").replace(":", " ").split():
        try:
            if hasattr(ctypes.CDLL(library), "cblas_sgemm"):
                return Path(library).name
        except OSError:  # the loader could not load it either, and said so
            continue
    return "MLX's own"


def _flags() -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        return "not compiled"
    # An ordinary g++ does not know the word.
    told = subprocess.run([compiler, "--kernel-flags"], capture_output=True, text=True, check=False)
    return told.stdout.strip() if told.returncode == 0 else "for any CPU"
