"""Runs on every rank: fails as its argument says; where only one rank fails, it is the last."""

import os
import signal
import sys
import time

import numpy as np
from support.mpi import report

from mlx_empire.comm.connect import connect
from mlx_empire.comm.failure import agree, guard, together
from mlx_empire.comm.thread import CommThread
from mlx_empire.errors import DoesNotFitError, UserError

comm = connect(deadline_seconds=2.0)
last = comm.rank == comm.size - 1
edges = [1000 * rank for rank in range(comm.size + 1)]
buffer = np.zeros(edges[-1], np.float32)


def user_error() -> None:
    if last:
        raise UserError("recipe.yaml:3: batch.micro_size: 0 must be at least 1")
    comm.barrier(60.0)


def bug() -> None:
    if last:
        raise ZeroDivisionError("a bug")
    comm.all_gather(buffer, edges)


def bug_beside_thread() -> None:
    """The others wait for their communication thread, in the data plane, when one rank fails."""
    with CommThread() as thread:
        if last:
            raise ZeroDivisionError("a bug")
        thread.wait(thread.submit(comm.all_gather, buffer, edges))


def quiet_exit() -> None:
    if last:
        sys.exit(0)
    comm.gather_json(None)


def agreed_by_all() -> None:
    with together(comm):
        raise DoesNotFitError("needs 3 GiB more")


def agreed_by_some() -> None:
    agree(comm, None)
    agree(comm, UserError(f"no model folder in /models/{comm.rank}") if comm.rank > 0 else None)


def stopped_at_barrier() -> None:
    comm.barrier(60.0)
    if last:
        os.kill(os.getpid(), signal.SIGSTOP)
    comm.barrier(1.5)


def stopped_in_data_plane() -> None:
    with CommThread() as thread:
        if last:
            os.kill(os.getpid(), signal.SIGSTOP)
        thread.wait(thread.submit(comm.all_gather, buffer, edges))


def late_but_alive() -> None:
    """Slower than half the deadline, twice: no false alarm."""
    for _ in range(2):
        if last:
            time.sleep(1.2)
        comm.all_gather(buffer, edges)
        comm.barrier(10.0)


with guard(comm):
    report({"rank": comm.rank, "hostname": comm.hostname})
    globals()[sys.argv[1]]()
    report({"finished": True})
