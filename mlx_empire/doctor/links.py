"""How fast every pair of machines is: mpirun with one process each, and what that means for a hostfile's `link=`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlx_empire.cluster.hostfile import Cluster, Host
from mlx_empire.cluster.other_hostfiles import written_hostfile
from mlx_empire.doctor.link_worker import MARK, SECONDS, Pair
from mlx_empire.errors import UnreachableError
from mlx_empire.progress import LAUNCHER_VARIABLE
from mlx_empire.run.mpirun import worker_line

START_SECONDS = 90.0
ALIKE = 0.15  # speeds of one wire differ by this much between two measurements
SMALL = "hosts-measured.txt"


def measure_links(
    hosts: Sequence[Host], folder: Path, environment: Mapping[str, str], interface: str | None = None
) -> dict[Pair, float]:
    """Bytes per second in each direction of every pair of `hosts` (by place). UnreachableError, with mpirun's words."""
    path = folder / SMALL
    path.write_text(written_hostfile(tuple(hosts), slots=1))
    cluster = Cluster(tuple(hosts), str(path))
    program = [sys.executable, "-u", "-m", "mlx_empire.doctor.link_worker"]
    alone = {
        name: value for name, value in environment.items() if name != LAUNCHER_VARIABLE
    }  # nobody reads beacons
    line = worker_line(path, cluster, program, alone, interface)
    seconds = START_SECONDS + 4 * SECONDS * len(hosts)
    with subprocess.Popen(
        line,
        env=alone,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, errors = process.communicate(timeout=seconds)
        except BaseException as error:  # Ctrl-C too: mpirun has left this terminal
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise UnreachableError(f"mpirun did not end within {seconds:.0f} s") from None
            raise
    marked = [text for text in said.splitlines() if text.startswith(MARK)]
    if not marked:
        last = [text for text in errors.splitlines() if text.strip(" -")]
        raise UnreachableError(" ".join(last[-3:]) or f"mpirun ended with exit code {process.returncode}")
    return {(a, b): rate for a, b, rate in json.loads(marked[-1].removeprefix(MARK))}


def rates_of_hosts(pairs: Mapping[Pair, float], count: int) -> list[float]:
    """What each of `count` machines is worth as `link=`, in bytes per second.

    A machine on a switch is as fast as its fastest pair, for the slower card sets a pair's pace. Where that does not
    explain every pair (cables of several speeds between the same machines), each is worth its slowest.
    """
    own = [[rate for pair, rate in pairs.items() if place in pair] for place in range(count)]
    fastest = [max(rates) for rates in own]
    explained = all(rate >= (1 - ALIKE) * min(fastest[a], fastest[b]) for (a, b), rate in pairs.items())
    return fastest if explained else [min(rates) for rates in own]
