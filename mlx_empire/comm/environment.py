"""Decides what a process knows before MLX and MPI are imported: who started it, and what was typed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from mlx_empire.comm.failure import guard
from mlx_empire.errors import EmpireError

# `cpu`: MLX computes there although it finds a GPU. Other values are refused.
DEVICE_VARIABLE = "MLX_EMPIRE_DEVICE"

Words = TypeVar("Words")


def under_mpirun() -> bool:
    """Whether a launcher that speaks PMIx (mpirun, prterun) started this process, with however many ranks."""
    return "OMPI_COMM_WORLD_SIZE" in os.environ or "PMIX_RANK" in os.environ


def asked(read: Callable[[], Words]) -> Words:
    """What `read` makes of the command line. Wrong usage ends this process in one line, with 64.

    Nothing large is imported for it, but under mpirun: there the ranks connect, so that it is said once.
    """
    try:
        return read()
    except (EmpireError, SystemExit) as wrong:  # argparse leaves after --help
        comm = None
        if under_mpirun():
            from mlx_empire.comm.connect import connect

            with guard(None):
                comm = connect()
        with guard(comm):
            raise wrong from None
    raise AssertionError("guard always leaves")
