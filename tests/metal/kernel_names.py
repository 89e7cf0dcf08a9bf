"""Which Metal kernels an MLX release brings: python tests/metal/kernel_names.py VERSION writes tests/fixtures/metal/.

The wheels for macOS hold `mlx.metallib`, whose function list names every compiled kernel: the tag `NAME`, two bytes of
length, the name with a zero at its end. What `mx.compile` and MLX itself fuse at run time is put together from the
structures in `*_ops.h`, which are listed as `op:NAME`. One file for each macOS that has a wheel of its own.
"""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "fixtures" / "metal"
SYSTEMS = ("15", "26")
_NAME = re.compile(rb"NAME(..)", re.DOTALL)
_WORD = re.compile(rb"[A-Za-z_]\w*\0", re.ASCII)
_OPERATIONS = ("unary_ops.h", "binary_ops.h", "ternary_ops.h")


def kernels_in(library: bytes) -> set[str]:
    """The names of a metallib's functions."""
    found = set()
    for tag in _NAME.finditer(library):
        name = library[tag.end() : tag.end() + int.from_bytes(tag[1], "little")]
        if _WORD.fullmatch(name):
            found.add(name[:-1].decode())
    return found


def names_in(wheel: Path) -> list[str]:
    """Kernels and operations that a macOS wheel of mlx-metal brings, in order."""
    with zipfile.ZipFile(wheel) as files:
        (library,) = (name for name in files.namelist() if name.endswith(".metallib"))
        headers = [name for name in files.namelist() if name.endswith(_OPERATIONS)]
        text = "".join(files.read(name).decode() for name in headers)
        operations = {f"op:{name}" for name in re.findall(r"^struct (\w+)", text, re.MULTILINE)}
        return sorted(kernels_in(files.read(library)) | operations)


@cache
def known_names(system: str, release: str | None = None) -> frozenset[str]:
    """What this folder's list for a macOS says of MLX's `release` (the installed one)."""
    path = FOLDER / f"kernels-{release or version('mlx')}-macos{system}.txt.gz"
    return frozenset(gzip.decompress(path.read_bytes()).decode().split())


def write(release: str) -> None:
    """Download the wheels and write their lists."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for system in SYSTEMS:
        with tempfile.TemporaryDirectory() as folder:
            platform = ["--platform", f"macosx_{system}_0_arm64", "--only-binary", ":all:", "--no-deps"]
            pip = [sys.executable, "-m", "pip", "download", "-q", "-d", folder, *platform]
            subprocess.run([*pip, f"mlx-metal=={release}"], check=True)
            names = names_in(next(Path(folder).glob("*.whl")))
        target = FOLDER / f"kernels-{release}-macos{system}.txt.gz"
        target.write_bytes(gzip.compress("".join(f"{name}\n" for name in names).encode(), mtime=0))
        print(f"{target}: {len(names)} names")


if __name__ == "__main__":
    write(sys.argv[1] if len(sys.argv) > 1 else version("mlx"))
