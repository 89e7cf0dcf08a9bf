"""Collectives over a real mpirun: values, bits, byte counts, both planes at once, idle waiting."""

import pytest
from support.mpi import run_ranks

WORKER = "tests/mpi/collectives_worker.py"


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_collectives_agree_with_numpy_and_with_the_plan(ranks: int) -> None:
    reports = run_ranks(ranks, WORKER, timeout=180.0)
    assert [report["rank"] for report in reports] == list(range(ranks))
    assert {report["size"] for report in reports} == {ranks}
    for report in reports[:-1]:  # all but the one that came late
        assert report["waited"] > 0.8
        assert report["idle_share"] < 0.2, "waiting for a late peer burns a core"
