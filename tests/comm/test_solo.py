"""A world of one: the same meaning without MPI, and the ways to end it."""

import subprocess
import sys

import numpy as np
import pytest

from mlx_empire.comm.connect import connect
from mlx_empire.comm.failure import AgreedExit, agree, guard, together
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.errors import DoesNotFitError, UserError


@pytest.fixture
def comm() -> SoloCommunicator:
    return SoloCommunicator("here")


def test_data_plane(comm: SoloCommunicator) -> None:
    buffer = np.arange(5, dtype=np.int8)
    comm.all_gather(buffer, [0, 5])
    assert buffer.tolist() == [0, 1, 2, 3, 4]
    out = np.zeros(5, np.int8)
    comm.scatter(buffer, [0, 5], out, 0)
    assert out.tolist() == buffer.tolist()
    total = np.ones(4, np.float32)
    one_and_a_half = np.array([0x3FC0], np.uint16)
    comm.reduce_scatter([(1, one_and_a_half)], [0, 4], total, [True], "bfloat16")
    assert total.tolist() == [1.0, 2.5, 1.0, 1.0]
    comm.reduce_scatter([], [0, 4], total, [False])
    assert total.tolist() == [1.0, 2.5, 1.0, 1.0]
    assert (comm.traffic.sent, comm.traffic.received) == ([0], [0])


def test_control_plane(comm: SoloCommunicator) -> None:
    assert comm.broadcast_json({1: (2, 3)}) == {"1": [2, 3]}
    assert comm.gather_json("x") == ["x"]
    assert [a.tolist() for a in comm.gather_arrays(np.arange(3))] == [[0, 1, 2]]
    comm.barrier(0.0)


def test_connect_alone_does_not_import_mpi() -> None:
    program = (
        "import sys; from mlx_empire.comm.connect import connect; c = connect();"
        "print(c.rank, c.size, any(m.startswith('mpi4py') for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1", "False"]


@pytest.mark.parametrize("bucket", [0, -1, (1 << 30) + 1])
def test_buckets_stay_below_what_mpi_counts(bucket: int) -> None:
    with pytest.raises(ValueError, match="bucket_bytes"):
        connect(bucket_bytes=bucket)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("a: b"), 64, "mlx_empire: a: b\n"),
        (KeyboardInterrupt(), 143, "mlx_empire: stopped by the keyboard\n"),
        (ZeroDivisionError("oops"), 70, "ZeroDivisionError: oops\n"),
        (SystemExit(5), 5, ""),
    ],
)
@pytest.mark.parametrize("connected", [True, False])
def test_guard_says_what_happened_and_leaves(comm, capsys, error, code, said, connected) -> None:
    with pytest.raises(SystemExit) as left, guard(comm if connected else None):
        raise error
    assert left.value.code == code
    stderr = capsys.readouterr().err
    assert stderr.endswith(said)
    assert ("Traceback" in stderr) == (code == 70)


def test_agreement(comm: SoloCommunicator, capsys: pytest.CaptureFixture[str]) -> None:
    agree(comm, None)
    with pytest.raises(AgreedExit) as left, guard(comm), together(comm):
        raise DoesNotFitError("too large")
    assert left.value.code == 3
    assert capsys.readouterr().err == "mlx_empire: too large\n"
