"""The preloaded BLAS answers everything that MLX's CPU wheel asks of cblas, and with the right numbers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

SOURCE = Path(__file__).resolve().parents[2] / "benchmarks" / "fast_blas.c"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MLX on macOS computes with Metal")


def test_every_cblas_routine_that_mlx_imports_is_defined():
    library = (Path(mx.__file__).parent / "lib" / "libmlx.so").read_bytes()
    imported = {name.decode() for name in re.findall(rb"\0cblas_(\w+)\0", library)}
    assert imported == set(re.findall(r"^GEMM\((\w+),", SOURCE.read_text(), re.MULTILINE))


PROGRAM = """
import mlx.core as mx, numpy as np
a, b = mx.random.normal((3, 50, 70)), mx.random.normal((3, 40, 70))
for left, right in [(a, b), (a + 2j * a, b - 1j * b)]:
    product = np.array(left @ right.swapaxes(1, 2))
    kind = np.complex128 if np.iscomplexobj(product) else np.float64
    expected = np.einsum("bij,bkj->bik", np.array(left).astype(kind), np.array(right).astype(kind))
    assert np.abs(product - expected).max() < 1e-3, np.abs(product - expected).max()
print("openblas" in open("/proc/self/maps").read())
"""


def test_products_are_right(tmp_path):
    openblas = pytest.importorskip("scipy_openblas32")
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler")
    folder, built = openblas.get_lib_dir(), tmp_path / "libfast_blas.so"
    command = [compiler, "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(built), str(SOURCE)]
    subprocess.run([*command, f"-L{folder}", f"-Wl,-rpath,{folder}", "-lscipy_openblas"], check=True)
    environment = os.environ | {"LD_PRELOAD": str(built), "OPENBLAS_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout.strip()) == (0, "True"), ended.stderr
