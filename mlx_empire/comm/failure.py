"""How a run ends when something goes wrong: who says what, once, and how the other ranks are stopped.

Two cases. An error that all ranks look for together (a bad recipe, a plan that does not fit) is *agreed*:
rank 0 says it, all ranks leave with the same exit code, nobody is killed. Any other exception on one rank
is said by that rank, and MPI ends all others at once: they would wait for ever.
"""

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_empire import progress
from mlx_empire.comm.protocol import Communicator
from mlx_empire.errors import EmpireError, of_gpu

FAULT_VARIABLE = "MLX_EMPIRE_FAULT"
INTERNAL_ERROR = 70
STOPPED = 143
# mpirun drops what it has not yet read when a job is aborted
FLUSH_SECONDS = 0.2


def arm_faults(rank: int) -> None:
    """From here on this rank fails where a test asks for it by MLX_EMPIRE_FAULT (see `faults`, which is imported only
    then). UserError for a value that cannot be read."""
    text = os.environ.get(FAULT_VARIABLE)
    if not text:
        progress.on_reach(None)
        return
    from mlx_empire.faults import Faults

    progress.on_reach(Faults(rank, text, FAULT_VARIABLE))


class AgreedExit(SystemExit):
    """All ranks leave with this exit code, and what there was to say has been said."""


@contextmanager
def guard(comm: Communicator | None) -> Iterator[None]:
    """Around everything a rank does: an exception is printed with rank and host and ends all ranks.

    EmpireError: one line and its exit code; one that all ranks share is said by rank 0, and nobody is
    stopped. An error of the GPU: as `of_gpu` says. Anything else: the traceback and 70; Ctrl-C: 143. A plain
    sys.exit on one rank would leave the others waiting, so it ends them too, with its code (70 for 0: the work
    is not done).
    comm: None before there is one; then this process leaves alone.
    """
    try:
        yield
    except AgreedExit as agreed:
        if comm is None or comm.rank == 0:
            progress.tell("exit", code=agreed.code)
        raise
    except EmpireError as error:
        if error.shared and comm is not None:
            if comm.rank == 0:
                progress.tell_failure(error.exit_code, str(error))
                print(f"mlx_empire: {error}", file=sys.stderr, flush=True)
            raise AgreedExit(error.exit_code) from None
        end(comm, f"mlx_empire: {_place(comm)}{error}", error.exit_code)
    except KeyboardInterrupt:
        end(comm, f"mlx_empire: {_place(comm)}stopped by the keyboard", STOPPED)
    except SystemExit as error:
        if comm is None or comm.size == 1:
            raise
        code = error.code if isinstance(error.code, int) and error.code else INTERNAL_ERROR
        end(comm, f"mlx_empire: {_place(comm)}called sys.exit({error.code!r}) while others run", code)
    except BaseException as error:
        if told := of_gpu(error):
            end(comm, f"mlx_empire: {_place(comm)}{told}", told.exit_code)
        end(
            comm,
            f"mlx_empire: {_place(comm)}internal error\n{traceback.format_exc().rstrip()}",
            INTERNAL_ERROR,
            f"internal error: {traceback.format_exception_only(error)[-1].strip()}",
        )
        raise AssertionError from error


def agree(comm: Communicator, error: EmpireError | None) -> None:
    """Raise AgreedExit on all ranks if any rank has an error. Collective, control plane.

    Rank 0 prints each distinct message once, with the ranks that have it unless all do. Exit code: that of
    the lowest rank with an error.
    """
    reports = comm.gather_json(None if error is None else [str(error), error.exit_code])
    failed = [rank for rank, report in enumerate(reports) if report is not None]
    if not failed:
        return
    if comm.rank == 0:
        for message in dict.fromkeys(reports[rank][0] for rank in failed):
            ranks = [rank for rank in failed if reports[rank][0] == message]
            names = ", ".join(f"rank {rank} on {comm.hostnames[rank]}" for rank in ranks)
            print(
                f"mlx_empire: {message if len(ranks) == comm.size else f'{names}: {message}'}",
                file=sys.stderr,
            )
            progress.tell_failure(reports[ranks[0]][1], message, ranks[0], comm.hostnames[ranks[0]])
        sys.stderr.flush()
    raise AgreedExit(reports[failed[0]][1])


@contextmanager
def together(comm: Communicator) -> Iterator[None]:
    """Around work that every rank does and may refuse: an EmpireError inside is agreed at the end.

    The work must call no collective, or ranks that failed and ranks that did not would wait for each other.
    """
    error = None
    try:
        yield
    except EmpireError as raised:
        error = raised
    agree(comm, error)


def _place(comm: Communicator | None) -> str:
    return "" if comm is None or comm.size == 1 else f"rank {comm.rank} on {comm.hostname}: "


def end(
    comm: Communicator | None, message: str, code: int, cause: str = "", failed: int | None = None
) -> None:
    """Say it, to the user and to the launcher (`cause`: in one line), and end all ranks.

    failed: the rank that is to blame, if it is another one.
    """
    host = None if comm is None or failed is None else comm.hostnames[failed]
    progress.tell_failure(code, cause or message.removeprefix(f"mlx_empire: {_place(comm)}"), failed, host)
    print(message, file=sys.stderr, flush=True)
    if comm is None:
        raise SystemExit(code)
    if comm.size > 1:
        time.sleep(FLUSH_SECONDS)
    comm.abort(code)
