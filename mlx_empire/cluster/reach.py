"""Decides how a machine of the hostfile is reached: this one directly, the others by what mpirun would use, ssh.

Nothing here waits for a person: ssh asks for no password, and a deadline ends every command.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from mlx_empire.cluster.hostfile import Cluster, Host

PROBE_SECONDS = 20.0
_SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10"
_AGENTS = ("PRTE_MCA_plm_ssh_agent", "OMPI_MCA_plm_rsh_agent")
SHELL = set("&;|'\"")  # what this machine's shell would take for itself
T = TypeVar("T")


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


def line_to(host: Host, command: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The words that run `command` on a machine, the way mpirun would reach it."""
    if is_here(host):
        return list(command)
    agent = next((environment[name] for name in _AGENTS if name in environment), _SSH)
    login = [] if host.user is None else ["-l", host.user]
    port = [] if host.port is None else ["-p", str(host.port)]
    return [*shlex.split(agent), *login, *port, host.name, shlex.join(command)]


def login(host: Host) -> str:
    """How ssh is told of a machine: `-p 2222 me@king.local`."""
    port = "" if host.port is None else f"-p {host.port} "
    user = "" if host.user is None else f"{host.user}@"
    return f"{port}{user}{host.name}"


def typed_for(host: Host, command: str) -> str:
    """What a person types here to run a command there, with a terminal for the password that sudo asks for."""
    if is_here(host):
        return command
    return f"ssh -t {login(host)} {shlex.quote(command) if SHELL & set(command) else command}"


def ask(
    host: Host,
    command: Sequence[str],
    environment: Mapping[str, str],
    seconds: float = PROBE_SECONDS,
    said: str = "",
) -> subprocess.CompletedProcess[str]:
    """What became of `command` on a machine; it reads `said`. OSError or SubprocessError when it cannot be reached."""
    return subprocess.run(
        line_to(host, command, environment),
        env=dict(environment),
        input=said,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def with_python(words: Sequence[str]) -> list[str]:
    """The command that runs this Python with `words` in this folder on any machine: both have the same paths there."""
    return ["/bin/sh", "-c", f'cd {shlex.quote(os.getcwd())} && exec "$0" "$@"', sys.executable, *words]


def of_all(cluster: Cluster, question: Callable[[Host], T]) -> dict[str, T]:
    """What `question` answers of each machine, by name, in the hostfile's order. All are asked at once."""
    found: dict[str, T] = {}
    threads = [
        threading.Thread(target=lambda host=host: found.__setitem__(host.name, question(host)), daemon=True)
        for host in cluster.nodes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {host.name: found[host.name] for host in cluster.nodes if host.name in found}
