"""Decides which line of the hostfile each rank stands on, what it may use there, and where the hostfile is.

A rank knows its machine by the name that machine gives itself; a hostfile by the name that reaches it. They
match when they are equal (case aside), when one is the other without its domain, or when only the domains
differ (a Mac that is king.local to Bonjour and king.lan to the router), in this order; each host may match
one machine only.
"""

import ipaddress
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mlx_empire.cluster.hostfile import Cluster, Host, Node
from mlx_empire.errors import UserError
from mlx_empire.recipe.text import one_line

_LAUNCHERS = frozenset({"mpirun", "mpiexec", "orterun", "prterun", "prte", "prun"})
_HOSTFILE_OPTIONS = frozenset({"hostfile", "machinefile"})
_GENERATIONS = 8  # how many parents of this process are looked at


def match_ranks(
    cluster: Cluster | None, hostnames_by_rank: Sequence[str], measured: Sequence[Node]
) -> list[Node]:
    """What each rank may use, rank by rank.

    `hostnames_by_rank` and `measured` (`measure_this_machine` of each rank) are indexed by rank. What the
    hostfile does not say is taken from `measured`; without a hostfile, everything. The hostfile may only lower the
    limit that a machine reports. Ranks on the same machine divide its memory and limit equally. Raises UserError
    when a machine is on no line of the hostfile, or on more than one.
    """
    assert len(hostnames_by_rank) == len(measured), "one measurement per rank"
    machines = [_normal(name) for name in hostnames_by_rank]
    hosts = _match_machines(cluster, dict(zip(machines, hostnames_by_rank, strict=True)))
    nodes = []
    for machine, name, own in zip(machines, hostnames_by_rank, measured, strict=True):
        host = hosts.get(machine) or Host(name)
        memory = own.memory_bytes if host.memory_bytes is None else host.memory_bytes
        limit = own.limit_bytes if host.limit_bytes is None else min(host.limit_bytes, own.limit_bytes)
        ranks = machines.count(machine)
        nodes.append(
            Node(
                name=name if _is_loopback(host.name) else host.name,
                slots=host.slots,
                role=host.role,
                memory_bytes=memory // ranks,
                limit_bytes=min(limit, memory) // ranks,
                link_bytes_per_second=host.link_bytes_per_second,
                chip=host.chip or own.chip,
                disk_bytes=host.disk_bytes,
                compiles=own.compiles,
                measured=own.measured,
            )
        )
    return nodes


def planned_nodes(cluster: Cluster, own: Node) -> list[Node]:
    """What each rank could use if the hostfile were run, without asking its machines: a node for each slot.

    What the hostfile says of a machine counts; `own` (`measure_this_machine`) stands in where it is silent about
    the one that this runs on. Raises UserError for any other machine whose memory it does not say.
    """
    names, measured = [], []
    for host in cluster.nodes:
        here = is_this_machine(host.name, own.name)
        if host.memory_bytes is None and not here:
            raise UserError(
                f"{cluster.source}:{host.line}: {host.name}: its memory is not written here, and this machine cannot "
                f"measure another; write {host.name} slots={host.slots} # memory=256GiB"
            )
        names += [host.name] * host.slots
        measured += [own if here else _as_written(host)] * host.slots
    return match_ranks(cluster, names, measured)


def _as_written(host: Host) -> Node:
    """A machine that nobody asks, as its line describes it."""
    memory, limit = host.memory_bytes or 0, host.limit_bytes or 0
    return Node(host.name, host.slots, None, memory, limit, measured=False)


def _match_machines(cluster: Cluster | None, names: dict[str, str]) -> dict[str, Host]:
    """The host of each machine (by normalised name; `names` has the names as given)."""
    if cluster is None:
        return {}
    found: dict[str, Host] = {}
    for machine, name in names.items():
        candidates = _candidates(cluster, machine)
        if len(candidates) != 1:
            listed = ", ".join(host.name for host in candidates or cluster.nodes[:8])
            problem = "is not in the hostfile" if not candidates else "could be any of several hosts"
            raise UserError(
                f"{cluster.source}: machine {one_line(name)} {problem} ({listed}); "
                "write each machine's line with the name that `hostname` prints there"
            )
        found[machine] = candidates[0]
    for machine, host in found.items():
        twins = [names[other] for other, its in found.items() if its is host and other != machine]
        if twins:
            raise UserError(
                f"{cluster.source}:{host.line}: {host.name} matches two machines, "
                f"{one_line(names[machine])} and {one_line(twins[0])}; "
                "write a line for each with the name that `hostname` prints there"
            )
    return found


def _candidates(cluster: Cluster, machine: str) -> list[Host]:
    """The hosts that match `machine` at the first of the levels of likeness at which any does."""
    levels = (
        lambda host: host == machine,
        lambda host: host.startswith(machine + ".") or machine.startswith(host + "."),
        lambda host: _label(host) == _label(machine),
        _is_loopback,
    )
    for alike in levels:
        hosts = [host for host in cluster.nodes if alike(_normal(host.name))]
        if hosts:
            return hosts
    return []


def _normal(name: str) -> str:
    return name.strip().rstrip(".").lower()


def _label(name: str) -> str:
    """A name's first label; all of an address."""
    return name if _address(name) else name.split(".")[0]


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def is_this_machine(name: str, own: str) -> bool:
    """Whether a hostfile's name means the machine that calls itself `own`, where this runs."""
    return _is_loopback(name) or _normal(name) == _normal(own)


def _is_loopback(name: str) -> bool:
    """Whether this name means "here" on every machine."""
    address = _address(name)
    return address.is_loopback if address else _normal(name) in ("localhost", "localhost.localdomain")


def find_hostfile(recipe_hosts: Path | None, argument: Path | None) -> Path | None:
    """The hostfile to read: `--hosts` (`argument`), else `run.hosts`, else the one that mpirun was given,
    else None.

    mpirun tells its children nothing, so its command line is read from the process table. It is found only by
    processes on the machine where mpirun was started (rank 0's): let rank 0 ask and broadcast. Only existing
    files are taken from there.
    """
    if argument is not None:
        return argument
    if recipe_hosts is not None:
        return recipe_hosts
    process = os.getppid()
    for _ in range(_GENERATIONS):
        if process <= 1:
            break
        parent, arguments, folder = _process(process)
        found = hostfile_argument(arguments)
        if found is not None and (folder / found).is_file():
            return folder / found
        process = parent
    return None


def hostfile_argument(arguments: Sequence[str]) -> Path | None:
    """The hostfile in the command line `arguments`, if that is a launcher's of Open MPI and names one."""
    if not arguments or Path(arguments[0]).name not in _LAUNCHERS:
        return None
    for position, word in enumerate(arguments[1:], start=1):
        option, equals, value = word.partition("=")
        if word.startswith("-") and option.lstrip("-") in _HOSTFILE_OPTIONS:
            if equals:
                return Path(value)
            return Path(arguments[position + 1]) if position + 1 < len(arguments) else None
    return None


def _process(pid: int) -> tuple[int, list[str], Path]:
    """(parent's pid, command line, working directory) of a process; (0, [], .) when it cannot be seen."""
    proc = Path("/proc") / str(pid)
    try:
        if proc.is_dir():
            parent = int((proc / "stat").read_text().rpartition(")")[2].split()[1])
            arguments = (proc / "cmdline").read_bytes().decode(errors="surrogateescape").split("\0")
            return parent, arguments, Path(os.readlink(proc / "cwd"))
        listed = subprocess.run(
            ["/bin/ps", "-o", "ppid=,args=", "-p", str(pid)],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        parent_text, *arguments = listed.stdout.split()  # a path with spaces cannot be told apart here
        return int(parent_text), arguments, Path()
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0, [], Path()
