"""The mutants of `benchmarks/mutants.py` stay such: each line stands once in its file, and its tests are there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def loaded() -> Any:
    """The script as a module: its folder is not for other tests to import from."""
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "benchmarks" / "mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module
    spec.loader.exec_module(module)
    return module


mutants = loaded()


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.file)
def test_its_line_is_there_once_and_so_are_its_tests(mutant: Any) -> None:
    assert (ROOT / "mlx_empire" / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
    for test in mutant.tests:
        assert (ROOT / test).is_file()


def test_what_no_test_sees_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mutants, "run_tests", lambda folder, tests: 0)
    assert mutants.main(["--only", "optim/adamw.py"]) == 1
    assert capsys.readouterr().out.count("SURVIVES") == 2


def test_a_word_that_is_in_no_mutant_is_refused_before_any_test_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mutants, "run_tests", lambda folder, tests: pytest.fail("the tests were started"))
    with pytest.raises(SystemExit) as left:
        mutants.main(["--only", "unicorn"])
    assert left.value.code == 2
    assert "unicorn: is in no mutant" in capsys.readouterr().err


def test_the_page_has_every_mutant_and_says_that_all_are_seen() -> None:
    page = (ROOT / "docs" / "mutants.md").read_text()
    assert page == mutants.page([(mutant, True) for mutant in mutants.MUTANTS]), "run make mutants"


def test_a_test_that_fails_and_one_that_passes_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_a(): assert False\n")
    (tmp_path / "test_b.py").write_text("def test_b(): assert True\n")
    assert [mutants.run_tests(tmp_path, [name]) for name in ("test_a.py", "test_b.py")] == [1, 0]
