"""Decides what the machine that runs this process can hold: its memory, and how much of it a run may use.

The limit is the one that the GPU reports (Metal's recommended working set); without a GPU it is three
quarters of the memory. On Linux the memory is what the control group allows, where that is less than what is
installed.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx

from mlx_empire.cluster.hostfile import Node, default_limit


def measure_this_machine() -> Node:
    """The machine of this process as one whole node, named as the network knows it (`socket.gethostname`)."""
    memory = min(_installed_memory(), cgroup_limit(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))
    limit, chip = default_limit(memory), None
    if mx.metal.is_available():
        info = mx.device_info()
        limit = int(info["max_recommended_working_set_size"])
        chip = str(info["device_name"])
    return Node(socket.gethostname(), 1, None, memory, min(limit, memory), None, chip)


def _installed_memory() -> int:
    if sys.platform == "darwin":
        return int(subprocess.check_output(["/usr/sbin/sysctl", "-n", "hw.memsize"]))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cgroup_limit(membership: Path, root: Path) -> int:
    """The least memory limit in bytes of this process's control groups and their parents; 2**63 where none is
    set.

    `membership` is /proc/self/cgroup (lines `id:controllers:path`), `root` where the groups are mounted.
    Version 2 keeps the limit in `memory.max`, version 1 in `memory/.../memory.limit_in_bytes`.
    """
    least = 2**63
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return least
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = base / group.lstrip("/")
        for candidate in (folder, *folder.parents):
            if candidate.is_relative_to(base):
                least = min(least, _read_limit(candidate / name))
    return least


def _read_limit(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return 2**63
