"""Machines on one machine: network namespaces with names, unequal memory and links that can be cut.

Each machine has a network, a host name, an /etc/hosts and, where control groups can be made, a memory limit of its own;
a bridge in a namespace of its own joins them. What stands in for ssh enters a machine if its link is up. Nothing
outside the namespaces is changed. Needs root and `ip`, `nsenter` and `unshare`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

TOOLS = ("ip", "nsenter", "unshare", "hostname", "mount")
CGROUPS = Path("/sys/fs/cgroup")

ENTER = """\
#!/bin/sh
# enter MACHINE COMMAND...: run a command on a machine.
machine=$1; shift
cgroup={cgroups}/{prefix}$machine
if test -d "$cgroup"; then echo $$ > "$cgroup/cgroup.procs"; fi
exec nsenter --net=/run/netns/{prefix}$machine unshare --uts --mount sh -c \\
  'hostname "$0" && mount --bind {folder}/hosts /etc/hosts && exec "$@"' "$machine" "$@"
"""
AGENT = """\
#!/bin/sh
# agent MACHINE COMMAND...: what ssh does, over the link that the machine has.
machine=$1; shift
if ! ip -n {prefix}net link show {prefix}$machine | grep -q master; then
  sleep 1; echo "ssh: connect to host $machine: No route to host" >&2; exit 255
fi
exec {folder}/enter "$machine" sh -c "$*"
"""


def why_not() -> str:
    """Why machines cannot be made here; "" where they can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)} here"
    if os.geteuid() != 0:
        return "network namespaces need root"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "namespaces are not allowed here"


class Machines:
    """Machines by name, each with its memory in bytes; the first is 10.77.0.1. Use as a context manager."""

    def __init__(self, folder: Path, memory: Mapping[str, int]) -> None:
        self.folder, self.memory = folder, dict(memory)
        self.struck = 0.0  # when a test broke something, in seconds since 1970
        self.prefix = f"e{os.getpid() % 100000}"  # an interface's name has at most 15 characters
        self.cgroups = next(
            (path for path in (CGROUPS / "memory", CGROUPS) if (path / "cgroup.procs").exists()), CGROUPS
        )

    def __enter__(self) -> Self:
        names = list(self.memory)
        hosts = ["127.0.0.1 localhost", *(f"10.77.0.{i} {name}" for i, name in enumerate(names, 1))]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        for name, text in (("enter", ENTER), ("agent", AGENT)):
            script = self.folder / name
            script.write_text(text.format(cgroups=self.cgroups, prefix=self.prefix, folder=self.folder))
            script.chmod(0o700)
        try:
            self._ip("netns", "add", self._name("net"))
            self._ip("-n", self._name("net"), "link", "add", "bridge", "up", "type", "bridge")
            for number, name in enumerate(names, 1):
                self._plug(name, number)
                self._limit(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything; processes of the machines must have ended."""
        for name in ("net", *self.memory):
            subprocess.run(["ip", "netns", "del", self._name(name)], capture_output=True, check=False)
            if (self.cgroups / self._name(name)).is_dir():
                subprocess.run(["rmdir", self.cgroups / self._name(name)], capture_output=True, check=False)

    def on(self, machine: str, command: Sequence[str]) -> list[str]:
        """The command as it runs on a machine."""
        return [str(self.folder / "enter"), machine, *command]

    def environment(self) -> dict[str, str]:
        """For mpirun on a machine: how it reaches the others."""
        return {"PRTE_MCA_plm_ssh_agent": str(self.folder / "agent")}

    def cut(self, machine: str) -> None:
        """Pull the machine's cable."""
        self._ip("-n", self._name("net"), "link", "set", self._name(machine), "nomaster")

    def join(self, machine: str) -> None:
        """Plug the cable in again."""
        self._ip("-n", self._name("net"), "link", "set", self._name(machine), "master", "bridge")

    def throttle(self, machine: str, mbit: float) -> None:
        """Limit the machine's card to so many megabits per second in each direction (needs `tc`).

        Small packets go first, or acknowledgements would wait behind the other direction's data.
        """
        own, net = self._name(machine), self._name("net")
        for space, device in ((own, "net0"), (net, own)):
            for words in (
                "qdisc add dev {} root handle 1: htb default 20",
                "class add dev {} parent 1: classid 1:1 htb rate {m}mbit burst 64kb quantum 3000",
                "class add dev {} parent 1:1 classid 1:10 htb rate {s}mbit ceil {m}mbit prio 0 quantum 3000",
                "class add dev {} parent 1:1 classid 1:20 htb rate {l}mbit ceil {m}mbit prio 1 quantum 3000",
                "filter add dev {} parent 1: protocol ip prio 1 u32 match u16 0 0xff80 at 2 flowid 1:10",
            ):
                command = words.format(device, m=mbit, s=mbit / 10, l=mbit * 0.9).split()
                subprocess.run(["tc", "-n", space, *command], check=True, capture_output=True, text=True)

    def processes(self, machine: str) -> list[int]:
        """The machine's processes."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self._name(machine)], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in listed.stdout.split()]

    def _plug(self, name: str, number: int) -> None:
        own, net = self._name(name), self._name("net")
        self._ip("netns", "add", own)
        self._ip("link", "add", "net0", "netns", own, "type", "veth", "peer", "name", own, "netns", net)
        self._ip("-n", net, "link", "set", own, "master", "bridge", "up")
        self._ip("-n", own, "addr", "add", f"10.77.0.{number}/24", "dev", "net0")
        for device in ("lo", "net0"):
            self._ip("-n", own, "link", "set", device, "up")

    def _limit(self, name: str) -> None:
        """A memory limit by control group, where one can be made; else the hostfile's figure is all there is."""
        group = self.cgroups / self._name(name)
        try:
            group.mkdir()
            for file in ("memory.limit_in_bytes", "memory.max"):
                if (group / file).exists():
                    (group / file).write_text(str(self.memory[name]))
        except OSError:
            pass

    def limited(self, name: str) -> bool:
        """Whether a control group holds the machine to its memory."""
        group = self.cgroups / self._name(name)
        return any((group / file).exists() for file in ("memory.limit_in_bytes", "memory.max"))

    def _name(self, name: str) -> str:
        return f"{self.prefix}{name}"

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
