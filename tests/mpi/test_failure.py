"""A rank fails in some way: the job ends within seconds, names rank and host, returns the right code."""

import pytest
from support.mpi import Launch, launch_ranks

WORKER = "tests/mpi/failure_worker.py"


def launch(case: str, ranks: int = 2) -> tuple[Launch, list[str]]:
    """The launch and what our ranks said: mpirun adds lines of its own."""
    result = launch_ranks(ranks, WORKER, [case], timeout=60.0)
    assert not result.timed_out, result.stderr
    assert result.seconds < 20.0
    assert all("rank" in report for report in result.reports), result.stderr
    return result, [line for line in result.stderr.splitlines() if line.startswith("mlx_empire: ")]


def name(result: Launch, rank: int) -> str:
    return f"rank {rank} on {result.reports[rank]['hostname']}"


def test_a_user_error_on_one_rank_ends_all() -> None:
    result, said = launch("user_error", 3)
    assert said == [f"mlx_empire: {name(result, 2)}: recipe.yaml:3: batch.micro_size: 0 must be at least 1"]
    assert result.returncode == 64
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("case", ["bug", "bug_beside_thread"])
def test_a_bug_on_one_rank_shows_its_traceback_once(case: str) -> None:
    result, said = launch(case)
    assert said == [f"mlx_empire: {name(result, 1)}: internal error"]
    assert result.stderr.count("ZeroDivisionError: a bug") == 1
    assert result.returncode == 70


def test_leaving_quietly_is_a_failure() -> None:
    result, said = launch("quiet_exit")
    assert said == [f"mlx_empire: {name(result, 1)}: called sys.exit(0) while others run"]
    assert result.returncode == 70


def test_an_error_that_all_ranks_find_is_said_once() -> None:
    result, said = launch("agreed_by_all")
    assert said == ["mlx_empire: needs 3 GiB more"]
    assert result.returncode == 3
    assert "MPI_ABORT" not in result.stderr


def test_an_error_that_some_ranks_find_names_them() -> None:
    result, said = launch("agreed_by_some", 3)
    assert said == [f"mlx_empire: {name(result, rank)}: no model folder in /models/{rank}" for rank in (1, 2)]
    assert result.returncode == 64


@pytest.mark.parametrize(
    ("case", "operation"), [("stopped_at_barrier", "barrier"), ("stopped_in_data_plane", "all-gather")]
)
def test_a_stopped_rank_is_found_by_the_deadline(case: str, operation: str) -> None:
    result, said = launch(case)
    assert len(said) == 1
    assert said[0].startswith(f"mlx_empire: {name(result, 0)}: {operation}: waited ")
    assert f"for {name(result, 1)};" in said[0]
    assert result.returncode == 75


def test_a_late_rank_is_not_lost() -> None:
    result, said = launch("late_but_alive")
    assert (result.returncode, said) == (0, [])
    assert all(report["finished"] for report in result.reports)
