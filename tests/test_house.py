"""Data flows one way: a folder imports only from those below it, and only `comm/` knows MPI and mx.distributed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mlx_empire"
# Top to bottom. What stands on no floor is a verb and may use everything.
FLOORS = (
    "run",
    "report",
    "checkpoint",
    "supervise",
    "evaluate",
    "engine",
    "optim",
    "model",
    "adapters",
    "data",
    "comm",
    "plan",
    "cluster",
    "recipe",
    "arguments",
    "run_lock",
    "private_files",
    "faults",
    "progress",
    "errors",
)
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(file: Path) -> Iterator[str]:
    """The dotted names of everything that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor_of(name: str) -> int:
    """The floor's number, counted from the top; verbs stand above all."""
    return FLOORS.index(name) if name in FLOORS else -1


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_file_uses_only_what_stands_below_it(file: Path) -> None:
    own = floor_of(file.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    used = [name.split(".")[1] for name in imported(file) if name.startswith("mlx_empire.")]
    assert [name for name in used if floor_of(name) < own and name != "__version__"] == []


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_only_comm_knows_mpi(file: Path) -> None:
    names = [name for name in imported(file) if name.startswith(("mpi4py", "mlx.core.distributed"))]
    assert not names or file.relative_to(PACKAGE).parts[0] == "comm"
    assert "mx.distributed" not in file.read_text() or file.relative_to(PACKAGE).parts[0] == "comm"
