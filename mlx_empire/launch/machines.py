"""Decides which machines of a hostfile can be used now, and writes a hostfile of those that can.

A machine is there when it runs a command over ssh (or what Open MPI uses in its place) within a deadline. The user's
hostfile is never changed: the smaller one lies beside the run.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mlx_empire.cluster.hostfile import Cluster, Host
from mlx_empire.disk import replace_private

PROBE_SECONDS = 20.0
SMALLER = "hosts-that-answer.txt"
_SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10"
_AGENTS = ("PRTE_MCA_plm_ssh_agent", "OMPI_MCA_plm_rsh_agent")

Probe = Callable[[Host], str]  # what is wrong with a machine; "" for nothing


def is_here(host: Host) -> bool:
    """Whether a hostfile's name means this machine: its own address is one that can be listened on."""
    own = socket.gethostname().split(".")[0].lower()
    if host.name.lower() == "localhost" or host.name.split(".")[0].lower() == own:
        return True
    try:
        found = socket.getaddrinfo(host.name, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    return any(_bindable(family, address) for family, _, _, _, address in found)


def _bindable(family: int, address: tuple[object, ...]) -> bool:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def ask(
    host: Host, command: Sequence[str], environment: Mapping[str, str], seconds: float = PROBE_SECONDS
) -> subprocess.CompletedProcess[str]:
    """`command` run on a machine the way mpirun would reach it. OSError or SubprocessError when it cannot be."""
    agent = next((environment[name] for name in _AGENTS if name in environment), _SSH)
    login = [] if host.user is None else ["-l", host.user]
    port = [] if host.port is None else ["-p", str(host.port)]
    words = [] if is_here(host) else [*shlex.split(agent), *login, *port, host.name]
    line = [shlex.join(command)] if words else list(command)
    return subprocess.run(
        [*words, *line],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def probe_with(environment: Mapping[str, str], seconds: float = PROBE_SECONDS) -> Probe:
    """The probe that asks each machine to run `true`."""

    def probe(host: Host) -> str:
        if is_here(host):
            return ""
        try:
            answer = ask(host, ["true"], environment, seconds)
        except subprocess.TimeoutExpired:
            return f"no answer over ssh within {seconds:g} s"
        except (OSError, subprocess.SubprocessError) as error:
            return str(error)
        last = re.sub(r"\s+", " ", answer.stderr.strip().splitlines()[-1]) if answer.stderr.strip() else ""
        return "" if answer.returncode == 0 else last or f"ssh ended with exit code {answer.returncode}"

    return probe


def away(cluster: Cluster, probe: Probe) -> dict[str, str]:
    """The machines that cannot be used, by name, and why. All are asked at once."""
    found: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda host=host: found.__setitem__(host.name, probe(host)), daemon=True)
        for host in cluster.nodes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {host.name: found[host.name] for host in cluster.nodes if found.get(host.name)}


def without(cluster: Cluster, names: Mapping[str, str] | Sequence[str], folder: Path) -> tuple[Path, Cluster]:
    """A hostfile in `folder` with the lines of `cluster`'s but for those machines, and what it says."""
    kept = tuple(host for host in cluster.nodes if host.name not in names)
    lines = Path(cluster.source).read_text().split("\n")
    path = folder / SMALLER
    left_out = ", ".join(names)
    text = [f"# {cluster.source} without {left_out}, which did not answer. Made by mlx_empire.launch."]
    replace_private(path, "\n".join([*text, *(lines[host.line - 1] for host in kept)]) + "\n")
    return path, replace(cluster, nodes=kept, source=os.fspath(path))
