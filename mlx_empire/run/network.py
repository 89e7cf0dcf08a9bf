"""Decides which network Macs train over where nobody names one: the one that leads to all the other machines.

Open MPI would use every network that it finds, Wi-Fi and Apple's own peer-to-peer links among them, and the slowest of
them sets the pace. Not run in CI but for its reading of `route`: only macOS is asked.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

from mlx_empire.cluster.hostfile import Cluster
from mlx_empire.errors import UserError

ROUTE = "/sbin/route"
LOOPBACK = "lo0"


def chosen_interface(cluster: Cluster) -> str | None:
    """The interface over which this Mac reaches the others of the hostfile; None on one machine and on other systems.

    UserError where that is not one interface: whoever starts the run has to name it.
    """
    if sys.platform != "darwin" or len(cluster.nodes) < 2:
        return None
    return one_interface(cluster, interface_to)


def one_interface(cluster: Cluster, lead: Callable[[str], str | None]) -> str:
    """What `lead` (host -> interface, None where no route is known) says of all machines but this one. UserError."""
    found = {host.name: lead(host.name) for host in cluster.nodes}
    others = {host: interface for host, interface in found.items() if interface != LOOPBACK}
    names = set(others.values())
    if len(names) == 1 and (name := names.pop()) is not None:
        return name
    said = ", ".join(
        f"{host} by {interface or 'no route that is known'}" for host, interface in others.items()
    )
    raise UserError(
        f"{cluster.source}: the machines are not reached over one network ({said or 'all are this one'}); name it, "
        "such as --interface en0 or a subnet that all share, --interface 10.0.0.0/24"
    )


def interface_to(host: str) -> str | None:
    """The interface over which macOS sends to a host, by its routing table."""
    try:
        said = subprocess.run(
            [ROUTE, "-n", "get", host], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return read_route(said)


def read_route(text: str) -> str | None:
    """The interface in what `route -n get` prints."""
    found = re.search(r"^\s*interface:\s*(\S+)", text, re.MULTILINE)
    return found[1] if found else None
