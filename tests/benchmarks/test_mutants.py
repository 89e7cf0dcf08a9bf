"""The mutants of `benchmarks/mutants.py` stay such: each line stands once in its file, and its tests are there."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from mutants import MUTANTS, Mutant, main, run_tests  # noqa: E402


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.file)
def test_its_line_is_there_once_and_so_are_its_tests(mutant: Mutant) -> None:
    assert (ROOT / "mlx_empire" / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
    for test in mutant.tests:
        assert (ROOT / test).is_file()


def test_what_no_test_sees_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mutants.run_tests", lambda folder, tests: 0)
    assert main(["--only", "optim/adamw.py"]) == 1
    assert capsys.readouterr().out.count("SURVIVES") == 2


def test_a_test_that_fails_and_one_that_passes_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_a(): assert False\n")
    (tmp_path / "test_b.py").write_text("def test_b(): assert True\n")
    assert [run_tests(tmp_path, [name]) for name in ("test_a.py", "test_b.py")] == [1, 0]
