"""The compiler that `make setup` puts before others: whom its flags reach, and which kernels it leaves in the cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_empire.comm import toolchain
from mlx_empire.comm.checks import environment, shake_hands
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.errors import UserError

SOURCE = Path(__file__).resolve().parents[2] / "benchmarks" / "fast_gxx.sh"
FLAGS = "-march=native -fno-math-errno -ffp-contract=off"
LINE = "-std=c++17 -O3 -Wall -fPIC -shared"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MLX on macOS compiles for Metal")


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A folder with the compiler as `make setup` puts it there."""
    (tmp_path / "ours").mkdir()
    return Path(shutil.copy(SOURCE, tmp_path / "ours" / "g++")).parent


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A folder with a g++ that writes its words into what it should make, if anything, and says them."""
    (tmp_path / "fake").mkdir()
    program = tmp_path / "fake" / "g++"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *--kernel-flags*) exit 1;; esac\nfor word; do test "$before" = -o && out=$word; '
        'before=$word; done\ntest -n "$out" && echo "$*" > "$out"\necho "$*"\n'
    )
    program.chmod(0o755)
    return program.parent


def compiler(words: str, *folders: Path, temporary: Path) -> str:
    """What g++ says with only `folders` and the system's own tools on the PATH."""
    path = os.pathsep.join([*map(str, folders), os.defpath])
    variables = os.environ | {"PATH": path, "TMPDIR": str(temporary)}
    return subprocess.run(
        ["g++", *words.split()], env=variables, capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_the_flags_reach_the_compiler_for_mlx_alone(tmp_path: Path, ours: Path, fake: Path) -> None:
    cache = tmp_path / "mlx" / "0.0" / "cpu"
    cache.mkdir(parents=True)
    built = cache / "libA.so"
    said = compiler(f"{LINE} {cache}/A.cpp -o {built}", ours, fake, temporary=tmp_path)
    assert said == f"{LINE} {cache}/A.cpp -o {built} {FLAGS}\n"
    assert built.read_text().startswith(said)
    for other in (f"{LINE} a.cpp -o {tmp_path}/a.so", "-O2 a.cpp", "--version"):
        assert compiler(other, ours, fake, temporary=tmp_path) == f"{other}\n"
    # Two environments on one PATH: each hands on to what stands behind it.
    twice = tmp_path / "twice"
    twice.mkdir()
    shutil.copy(SOURCE, twice / "g++")
    assert compiler("-O2 a.cpp", twice, ours, fake, temporary=tmp_path) == "-O2 a.cpp\n"


def test_those_of_two_checkouts_do_not_call_each_other_for_ever(
    tmp_path: Path, ours: Path, fake: Path
) -> None:
    other = shutil.copytree(ours, tmp_path / "other")
    assert compiler("a.cpp", ours, other, ours, fake, temporary=tmp_path) == "a.cpp\n"


def test_kernels_of_other_compilers_leave_the_cache(tmp_path: Path, ours: Path, fake: Path) -> None:
    cache = tmp_path / "mlx" / "0.0" / "cpu"
    cache.mkdir(parents=True)
    own, plain, elsewhere = (cache / f"lib{name}.so" for name in ("Own", "Plain", "Elsewhere"))
    compiler(f"{LINE} A.cpp -o {own}", ours, fake, temporary=tmp_path)
    compiler(f"{LINE} A.cpp -o {plain}", fake, temporary=tmp_path)
    *first, digest, size = own.read_text().split()
    # The same flags on a CPU that can do less.
    elsewhere.write_text(" ".join([*first, str(int(digest) + 1), size]))
    (cache / "A.cpp").write_text("source")
    compiler("--version", fake, temporary=tmp_path)
    assert plain.exists()
    assert elsewhere.exists()
    compiler("--version", ours, fake, temporary=tmp_path)
    assert sorted(path.name for path in cache.iterdir()) == ["A.cpp", "libOwn.so"]


PROGRAM = """
import hashlib, mlx.core as mx
x = mx.random.normal((3, 4099), key=mx.random.key(0), stream=mx.cpu)
with mx.stream(mx.cpu):
    y = mx.compile(lambda x: mx.exp(x - 1) * mx.sqrt(mx.abs(x)) + x * x)(x)
    print(hashlib.sha256(bytes(memoryview(y))).hexdigest())
"""


def test_mlx_asks_before_it_takes_a_kernel_from_its_cache(tmp_path: Path, ours: Path) -> None:
    """What the two tests above lean on: an ordinary g++'s kernel is there, and is not what the second process loads."""
    if shutil.which("g++", path=os.defpath) is None:
        pytest.skip("no C++ compiler")
    said, kernels = [], []
    for folders in ([], [ours]):
        path = os.pathsep.join([*map(str, folders), os.defpath])
        variables = os.environ | {"PATH": path, "TMPDIR": str(tmp_path)}
        command = [sys.executable, "-c", PROGRAM]
        said += [subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout]
        kernels += [[path.read_bytes() for path in tmp_path.glob("mlx/*/cpu/lib*.so")]]
    assert said[0] == said[1]
    assert [len(one) for one in kernels] == [1, 1]
    assert [FLAGS.encode() in one[0] for one in kernels] == [False, True]


def test_ranks_with_other_flags_or_another_blas_are_refused(
    ours: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told(SoloCommunicator):
        """Two ranks; the other one's compiler is an ordinary one, and nothing is preloaded there."""

        def __init__(self) -> None:
            super().__init__("king")
            self.hostnames = ["king", "soldier"]

        def gather_json(self, value: object) -> list[object]:
            return [value, other]

    monkeypatch.setenv("PATH", os.pathsep.join([str(fake), os.defpath]))
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    other = environment()
    assert (other["fused kernels"], other["matrix products"]) == ("for any CPU", "MLX's own")
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, [ours, fake])) + os.pathsep + os.defpath)
    with pytest.raises(UserError, match=r"^ranks differ in fused kernels; ") as raised:
        shake_hands(Told(), environment(), "mend it")
    row = str(raised.value).splitlines()[-1]
    assert row.index(FLAGS) < row.index("for any CPU")
    monkeypatch.setattr(toolchain, "_products", lambda: "libfast_blas.so")
    with pytest.raises(UserError, match=r"^ranks differ in matrix products, fused kernels; "):
        shake_hands(Told(), environment(), "mend it")


def test_the_blas_is_the_one_that_is_really_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = Path(sys.executable).parent.parent / "lib" / "libfast_blas.so"
    monkeypatch.setenv("LD_PRELOAD", str(tmp_path / "missing.so"))
    assert toolchain.toolchain()["matrix products"] == "MLX's own"
    if libraries.exists():
        monkeypatch.setenv("LD_PRELOAD", f"{tmp_path / 'missing.so'}:{libraries}")
        assert toolchain.toolchain()["matrix products"] == "libfast_blas.so"


def test_the_compiler_beside_the_interpreter_comes_first(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.setattr(sys, "executable", str(ours / "python"))
    monkeypatch.setattr(sys, "prefix", str(ours.parent))
    for _ in range(2):
        toolchain.prefer_own_compiler()
        assert os.environ["PATH"] == f"{ours}{os.pathsep}{os.defpath}"
    (ours / "g++").unlink()
    monkeypatch.setenv("PATH", os.defpath)
    toolchain.prefer_own_compiler()
    assert os.environ["PATH"] == os.defpath
