"""Replicas are equal after training steps; one bit in one rank's copy is found, and named."""

from support.mpi import run_ranks


def test_one_bit_is_found() -> None:
    reports = run_ranks(3, "tests/engine/replicas_worker.py")
    told = reports[0]["told"]
    assert all(report["told"] == told for report in reports)
    assert set(told) == {"0", "1", "2"}
    for stage, (message, shared) in told.items():
        assert message.startswith(
            f"rank 2 on {reports[2]['hostname']} differs from all others in model.layers.0."
        )
        assert ("/" in message.split(",")[0]) == (stage == "0"), "at stage 0 a state was changed"
        assert shared
