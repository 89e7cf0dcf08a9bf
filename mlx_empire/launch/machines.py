"""Decides which machines of a hostfile can be used now, writes a hostfile of them, and when a Mac may start again.

A machine is there when it runs a command over ssh (or what Open MPI uses in its place) within a deadline. The user's
hostfile is never changed: the smaller one lies beside the run.

A process that held hundreds of gigabytes of wired memory gives them back late, and now and then never before a
reboot. Not run in CI: only macOS has `vm_stat`. On other systems there is nothing to wait for.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from mlx_empire.cluster.hostfile import Cluster, Host
from mlx_empire.cluster.macos import read_vm_stat
from mlx_empire.cluster.reach import PROBE_SECONDS, ask, is_here, of_all
from mlx_empire.disk import replace_private

SMALLER = "hosts-that-answer.txt"

Probe = Callable[[Host], str]  # what is wrong with a machine; "" for nothing


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
    found = of_all(cluster, probe)
    return {name: problem for name, problem in found.items() if problem}


def without(cluster: Cluster, names: Mapping[str, str] | Sequence[str], folder: Path) -> tuple[Path, Cluster]:
    """A hostfile in `folder` with the lines of `cluster`'s but for those machines, and what it says."""
    kept = tuple(host for host in cluster.nodes if host.name not in names)
    lines = Path(cluster.source).read_text().split("\n")
    path = folder / SMALLER
    left_out = ", ".join(names)
    text = [f"# {cluster.source} without {left_out}, which did not answer. Made by mlx_empire.launch."]
    replace_private(path, "\n".join([*text, *(lines[host.line - 1] for host in kept)]) + "\n")
    return path, replace(cluster, nodes=kept, source=os.fspath(path))


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
