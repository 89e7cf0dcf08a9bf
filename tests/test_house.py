"""Data flows one way: a file imports only from the floors below its own; only `comm/` knows MPI and mx.distributed."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mlx_empire"
# Above all: the table of the commands. It imports none before it is asked for.
DOOR = ("cli", "__main__")
# The top floor: commands. They use everything below, and of each other only what capacity answers.
VERBS = (
    "train",
    "chat",
    "evaluate",
    "serve",
    "export",
    "capacity",
    "claims",
    "verify",
    "daughters",
    "launch",
    "runs",
    "init",
    "importing",
    "inspect",
    "keys",
    "doctor",
    "setup",
    "fetch",
    "open",
)
ANSWERS = ("capacity",)
ASKING = ("train", "verify")
# Below it, top to bottom: a folder or a file of the package.
FLOORS = (
    "page",
    "run",
    "report",
    "checkpoint",
    "evaluation",
    "engine",
    "formats",
    "optim",
    "data",
    "comm",
    "plan",
    "model",
    "cluster",
    "recipe",
    "faults",
    "progress",
    "disk",
    "errors",
    "sizes",
)
FILES = sorted(PACKAGE.rglob("*.py"))
SHARED_NAMES = {"main", "parser", "read", "Model", "ModelArgs"}  # every command's, and every model file's


def room(file: Path) -> str:
    """The folder or file of the package in which a file stands."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    """The dotted names of everything that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "names are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_every_file_stands_on_a_floor(file: Path) -> None:
    assert room(file) in (*DOOR, *VERBS, *FLOORS, "__init__")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_file_uses_only_what_stands_below_it(file: Path) -> None:
    own = room(file)
    used = {name.split(".")[1] for name in imported(file) if name.startswith("mlx_empire.")} - {"__version__"}
    below = FLOORS if own in VERBS else FLOORS[FLOORS.index(own) :] if own in FLOORS else DOOR
    answers = ANSWERS if own in ASKING else ()
    assert sorted(used - {own, *below, *answers}) == []


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_only_comm_knows_mpi(file: Path) -> None:
    names = [name for name in imported(file) if name.startswith(("mpi4py", "mlx.core.distributed"))]
    assert not names or room(file) == "comm"
    assert "mx.distributed" not in file.read_text() or room(file) == "comm"


def test_a_public_function_or_class_has_one_meaning() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(str(file.relative_to(PACKAGE)))
    assert {name: files for name, files in homes.items() if len(files) > 1 and name not in SHARED_NAMES} == {}
