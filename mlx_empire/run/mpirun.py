"""Decides the mpirun line and the environment in which it runs.

Open MPI hands the whole environment of mpirun to the ranks on its own machine, and to the others what `-x` names. So
mpirun itself gets only what is listed here: a token in the shell that starts a run reaches no rank and no log.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_empire import progress
from mlx_empire.cluster.hostfile import Cluster
from mlx_empire.comm.environment import DEVICE_VARIABLE
from mlx_empire.comm.failure import FAULT_VARIABLE
from mlx_empire.errors import UserError
from mlx_empire.plan.traffic import eager_words

# What mpirun and ssh need of a shell.
# fmt: off
KEPT = (
    "HOME", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "LC_MESSAGES", "LOGNAME", "PATH", "SHELL",
    "SSH_AUTH_SOCK", "TERM", "TMPDIR", "TZ", "USER", "VIRTUAL_ENV",
)
# What changes how ranks compute; forwarded to every machine.
FORWARDED = (
    "PYTHONPATH", "LD_PRELOAD", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONFAULTHANDLER",
    "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "MLX_DISABLE_COMPILE",
    "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER", "MLX_BFS_MAX_WIDTH", "MLX_ENABLE_TF32", "MLX_METAL_GPU_ARCH",
    "MLX_METAL_RESIDENCY_REFRESH_INTERVAL_MS", "MLX_RESIDENCY_SET_MAX_PCT", "MLX_SDPA_VJP_FALLBACK",
    "AGX_RELAX_CDM_CTXSTORE_TIMEOUT", "MLX_EMPIRE_CACHE", DEVICE_VARIABLE,
    FAULT_VARIABLE, progress.LAUNCHER_VARIABLE,
)
# fmt: on
# Open MPI's own settings, which mpirun forwards by itself.
SETTINGS = ("OMPI_MCA_", "PRTE_MCA_", "PMIX_MCA_", "OMPI_ALLOW_RUN_AS_ROOT")
# On Macs mpirun's daemons stay in their ssh sessions, which the Local Network permission does not concern, and keep
# their sockets where names are short: the system's own folder is longer than a socket's name may be.
MAC_WORDS = ("--leave-session-attached", "--prtemca", "prte_tmpdir_base", "/tmp")  # noqa: S108
# Settings that wedge GPUs when processes wait for one another.
REFUSED = ("MLX_METAL_FAST_SYNCH",)


@dataclass(frozen=True)
class Launch:
    """What is asked for. `overrides`: `key=value` words of the recipe; `extra`: more variables to forward, by name;
    `with_fewer`: more overrides for when machines are left out."""

    hostfile: Path
    cluster: Cluster
    recipe: Path
    overrides: tuple[str, ...] = ()
    interface: str | None = None
    extra: tuple[str, ...] = ()
    with_fewer: tuple[str, ...] = ()


def mpirun() -> Path:
    """The mpirun beside this interpreter, which is the one that mpi4py here speaks with; UserError without any."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise UserError(f"no mpirun beside {sys.executable} or on the PATH; run `make setup`")
    return Path(found).absolute()


def mpirun_line(launch: Launch, environment: Mapping[str, str]) -> list[str]:
    """The words of the command. `environment`: that in which it will run; decides what -x can name."""
    hostfile = str(launch.hostfile.absolute())
    words = [*_on(launch.interface, launch.cluster), *_named(environment, launch.extra)]
    words += [sys.executable, "-u", "-m", "mlx_empire.train", str(launch.recipe), *launch.overrides]
    return [*_start(launch.hostfile, launch.cluster), *words, "--hosts", hostfile]


def worker_line(
    hostfile: Path,
    cluster: Cluster,
    program: Sequence[str],
    environment: Mapping[str, str],
    interface: str | None = None,
) -> list[str]:
    """The words that run `program` on every machine of the hostfile."""
    return [*_start(hostfile, cluster), *_on(interface, cluster), *_named(environment), *program]


def _start(hostfile: Path, cluster: Cluster) -> list[str]:
    shared = any(host.slots > 1 for host in cluster.nodes)
    alone = len(cluster.nodes) == 1
    return [
        str(mpirun()),
        *("-hostfile", str(hostfile.absolute())),
        *("--bind-to", "none"),  # Open MPI would bind each rank to one core
        *(["--oversubscribe"] if shared else []),
        # Open MPI's TCP listens on all interfaces, whatever btl_tcp_if_include says; one machine does not need it.
        *(["--mca", "btl", "self,sm"] if alone else eager_words()),
        *(MAC_WORDS if sys.platform == "darwin" and not alone else []),
    ]


def _on(interface: str | None, cluster: Cluster) -> list[str]:
    """One network, for the ranks and for mpirun's daemons: without it Open MPI stripes over Wi-Fi too."""
    if interface is None:
        return []
    ranks = ["--mca", "btl_tcp_if_include", interface]
    # mpirun refuses a loopback for its daemons, and does not know subnets.
    if len(cluster.nodes) == 1 or "/" in interface:
        return ranks
    return [*ranks, "--prtemca", "prte_if_include", interface]


def _named(environment: Mapping[str, str], extra: Sequence[str] = ()) -> list[str]:
    return [word for name in (*FORWARDED, *extra) if name in environment for word in ("-x", name)]


def clean_environment(source: Mapping[str, str], extra: Sequence[str] = ()) -> dict[str, str]:
    """The variables of `source` that a run may see, and what every launch sets. UserError for one that is refused."""
    for name in REFUSED:
        if source.get(name, "0") not in ("", "0"):
            raise UserError(
                f"{name}={source[name]}: this setting makes GPUs hang when processes wait for one another; unset it"
            )
    missing = [name for name in extra if name not in source]
    if missing:
        raise UserError(
            f"--forward {missing[0]}: there is no such variable in the environment; export it first"
        )
    wanted = {*KEPT, *FORWARDED, *extra}
    kept = {name: value for name, value in source.items() if name in wanted or name.startswith(SETTINGS)}
    kept[progress.LAUNCHER_VARIABLE] = "1"
    if os.geteuid() == 0:
        kept |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if sys.platform == "darwin":
        kept["TMPDIR"] = "/tmp"  # noqa: S108  the system's own is longer than a socket's name may be
    return kept


def printed(line: Sequence[str]) -> str:
    """The command as a shell would take it."""
    return shlex.join(line)
