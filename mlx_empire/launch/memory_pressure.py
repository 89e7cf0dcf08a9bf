"""Decides when a Mac may start again: a process that held hundreds of gigabytes of wired memory gives them back late,
and now and then never before a reboot.

Not run in CI: only macOS has `vm_stat`. On other systems there is nothing to wait for.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from mlx_empire.cluster.hostfile import Cluster
from mlx_empire.launch.machines import ask

WAIT_SECONDS = 600.0
POLL_SECONDS = 5.0
_SLACK_BYTES = 8 << 30


class Memory(Protocol):
    """What each machine holds wired, and so cannot give to a new run."""

    def wired(self) -> dict[str, int]:
        """Bytes by host; without a host that does not tell."""


class NothingWired:
    """Linux: memory is free when a process has ended."""

    def wired(self) -> dict[str, int]:
        return {}


class VmStat:
    """macOS: `vm_stat` on every machine."""

    def __init__(self, cluster: Cluster, environment: Mapping[str, str]) -> None:
        self._cluster, self._environment = cluster, environment

    def wired(self) -> dict[str, int]:
        found = {}
        for host in self._cluster.nodes:
            try:
                answer = ask(host, ["/usr/bin/vm_stat"], self._environment)
            except (OSError, subprocess.SubprocessError):
                continue
            wired = read_vm_stat(answer.stdout)
            if wired is not None:
                found[host.name] = wired
        return found


def memory_of(cluster: Cluster, environment: Mapping[str, str]) -> Memory:
    """How to look at the wired memory of these machines."""
    return VmStat(cluster, environment) if sys.platform == "darwin" else NothingWired()


def read_vm_stat(text: str) -> int | None:
    """Wired bytes in the output of `vm_stat`; None where it does not say."""
    page = re.search(r"page size of (\d+) bytes", text)
    wired = re.search(r"Pages wired down:\s+(\d+)", text)
    return int(page[1]) * int(wired[1]) if page and wired else None


def wait_until_free(
    memory: Memory,
    before: Mapping[str, int],
    say: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], None] = time.sleep,
) -> list[str]:
    """Wait until every machine holds about as much wired memory as `before` the run; the hosts that still hold more.

    `stopped` ends the waiting.
    """
    told = False
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        now = memory.wired()
        held = [name for name, wired in now.items() if wired > before.get(name, wired) + _SLACK_BYTES]
        if not held or stopped() or time.monotonic() >= deadline:
            return held
        if not told:
            told = True
            say(f"waiting until the memory of the last run is free again on {', '.join(held)}")
        sleep(POLL_SECONDS)
