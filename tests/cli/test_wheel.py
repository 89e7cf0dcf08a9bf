"""A wheel in an environment of its own, far from the repository: every `mlx-empire` command of the README runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from support.pages import ROOT, code

FIXTURES = ROOT / "tests" / "fixtures"
PIP = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
# What makes a command of the README short enough for a test, or lets it end where no such machines are.
SHORT = {
    "train": ["run.steps=1", "run.eval_batches=1", "data.sequence_length=64", "batch.global_size=2"],
    "launch": ["--dry-run"],
    "open": ["--save", "mine.html"],
    "inspect": ["--html", "seen.html"],  # the template of the page comes with the wheel
}
# Tested in tests/test_readme.py.
NEEDS_THE_CLONE = {"train recipes/tiny.yaml"}


def commands() -> list[list[str]]:
    """Each `mlx-empire` command of the README in its order, as words."""
    pieces = [
        piece for piece in code((ROOT / "README.md").read_text()) if re.match(r"mlx-empire( |$)", piece)
    ]
    found = [shlex.split(piece, comments=True)[1:] for piece in pieces]
    return [words for words in found if words != ["VERB"] and " ".join(words) not in NEEDS_THE_CLONE]


def test_the_readme_shows_the_verbs_that_one_begins_with() -> None:
    verbs = {words[0] if words else "" for words in commands()}
    assert verbs >= {"", "init", "keys", "train", "status", "open", "launch", "capacity"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and of this one only what it depends on."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("mlx_empire", "recipes", "hosts"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    built = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(place), str(source)]
    subprocess.run(built, check=True, capture_output=True)
    (wheel,) = place.glob("mlx_empire-*.whl")
    venv.create(place / "env", with_pip=False, symlinks=True)
    python = place / "env" / "bin" / "python"
    (packages,) = (place / "env" / "lib").glob("python*/site-packages")
    subprocess.run(
        [*PIP, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True
    )
    # The dependencies, but not this checkout: the links of an editable installation are not followed.
    dependencies = place / "dependencies"
    dependencies.mkdir()
    for folder in map(Path, site.getsitepackages()):
        for entry in folder.iterdir():
            if "mlx_empire" not in entry.name and entry.suffix != ".pth":
                (dependencies / entry.name).symlink_to(entry)
    (packages / "dependencies.pth").write_text(f"{dependencies}\n")
    shutil.rmtree(source)
    return place / "env"


@pytest.mark.slow
def test_every_command_of_the_readme_runs_from_a_wheel(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    shutil.copytree(FIXTURES / "tiny-llama-260k", tmp_path / "models" / "mine")
    (tmp_path / "data" / "mine").mkdir(parents=True)
    for name in ("train", "valid"):
        rows = (FIXTURES / "wordnet" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "data" / "mine" / f"{name}.jsonl").write_text("".join(rows[:40]))
    path = f"{environment / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "MLX_EMPIRE_CACHE": str(tmp_path / "cache")}
    variables.pop("PYTHONPATH", None)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        # The run of the README's machines is not here; the one that was trained here is.
        words = tuple(word.replace("runs/scout", "runs/mine") for word in words)
        command = [str(environment / "bin" / "mlx-empire"), *words]
        return subprocess.run(
            command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=1200, check=False
        )

    where = subprocess.run(
        [environment / "bin" / "python", "-c", "import mlx_empire; print(mlx_empire.__file__)"],
        cwd=tmp_path, env=variables, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert Path(where.strip()).is_relative_to(environment), "this checkout must not be what runs"
    for words in commands():
        ended = run(*words, *SHORT.get(words[0] if words else "", []))
        missing = words[:1] == ["doctor"]  # its machines, which it tells
        assert ended.returncode == (1 if missing else 0), (words, ended.stderr)
        assert "Traceback" not in ended.stderr
    assert (tmp_path / "runs" / "mine" / "COMPLETE").exists()
    for page in ("scout.html", "seen.html", "mine.html"):
        assert (tmp_path / page).stat().st_size > 10_000
    assert (Path(where.strip()).parent / "page" / "static" / "page.js").is_file(), (
        "what is served is there, too"
    )
    assert run("list").stdout.splitlines()[1].startswith("runs/mine  complete")
    assert "py.typed" in {file.name for file in Path(where.strip()).parent.iterdir()}
