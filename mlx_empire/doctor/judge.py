"""What the machines' answers mean: each by itself, all beside one another, and beside the hostfile.

A row is *no* where a run would be refused, hang or give wrong figures, and a *note* where it would only be slower, or
would not survive what happens in a house within ten days.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from mlx_empire.cluster.hostfile import Cluster, Host, Node
from mlx_empire.cluster.macos import SPOTLIGHT
from mlx_empire.cluster.match import match_ranks
from mlx_empire.cluster.reach import typed_for
from mlx_empire.doctor.asking import LOCAL_NETWORK, NO_ROUTE, MachineAnswer, resolved
from mlx_empire.doctor.findings import Findings
from mlx_empire.errors import UserError
from mlx_empire.plan.wired_limit import raising
from mlx_empire.sizes import GIB, amount

CLOCK_SECONDS = 5.0
MEMORY_TOLERANCE = 0.05
SWAP_BYTES = GIB
UPDATES = "/Library/Preferences/com.apple.SoftwareUpdate AutomaticallyInstallMacOSUpdates"


def per_machine(cluster: Cluster, answers: Mapping[str, MachineAnswer], findings: Findings) -> None:
    """What each machine says of itself."""
    for host in cluster.nodes:
        answer = answers[host.name]
        address = resolved(host)
        findings.add(
            "name", host.name, address or "has no address here", bool(address), "" if address else _NAME
        )
        if answer.reason:
            found = f"{answer.reason} ({answer.said})" if answer.said else answer.reason
            findings.add("ssh", host.name, found, False, answer.mend)
            continue
        findings.add("ssh", host.name, f"answers after {answer.seconds:.1f} s")
        _itself(cluster, host, answer, findings)
        mac = _part(answer, "mac")
        if isinstance(mac, dict):
            for what, said, mend in _mac_rows(mac, next(iter(_part(answer, "disks") or {"runs": 0}))):
                findings.add(what, host.name, said, mend=typed_for(host, mend) if mend else "")
        for other, problem in (_part(answer, "reached") or {}).items():
            # A refusal comes from the other machine: the way to it is open.
            good = not problem or "refused" in problem
            blocked = bool(mac) and any(words in problem for words in NO_ROUTE)
            mend = "" if good else LOCAL_NETWORK if blocked else f"ssh {other} from there, and see why"
            findings.add(f"reaches {other}", host.name, "yes" if good else problem, good, mend)


_NAME = "write what `hostname` prints there, or its address; or add it to /etc/hosts"


def _part(answer: MachineAnswer, name: str) -> Any:
    """A fact; None where it is not known or could not be found out."""
    value = answer.facts.get(name)
    return None if isinstance(value, dict) and "problem" in value else value


def _itself(cluster: Cluster, host: Host, answer: MachineAnswer, findings: Findings) -> None:
    for name, value in answer.facts.items():
        if isinstance(value, dict) and "problem" in value:
            findings.add(name, host.name, str(value["problem"]), False, typed_for(host, _setup()))
    try:
        match_ranks(cluster, [str(answer.facts.get("hostname"))], [Node("", 1, None, 1, 1)])
        findings.add("hostname", host.name, str(answer.facts.get("hostname")))
    except UserError as error:
        keep = typed_for(host, f"sudo scutil --set HostName {shlex.quote(host.name)}")
        findings.add("hostname", host.name, str(error), False, keep)
    machine, device = _part(answer, "machine"), _part(answer, "device")
    if device is not None:
        words = [f"{name}={value}" for name, value in device.items()]
        findings.add("the device", host.name, " ".join(words) or "a CPU, of which MLX says nothing")
    if machine is not None:
        _memory(host, Node(**machine), findings)
    mac = _part(answer, "mac")
    swap = mac.get("swap_bytes") if isinstance(mac, dict) else _part(answer, "swap_bytes")
    if swap is not None:
        mend = "close other programs, or restart it before a long run" if swap > SWAP_BYTES else ""
        findings.add("swap in use", host.name, amount(swap), mend=mend)
    for folder, free in (_part(answer, "disks") or {}).items():
        findings.add(f"free for {folder}", host.name, amount(free))
    speed = _part(answer, "bytes_per_second")
    if speed is not None:
        findings.add("a file of 0.5 GB, on the disk", host.name, f"{speed / 1e9:.2f} GB/s")
    late = abs(answer.ahead) > CLOCK_SECONDS
    clock = f"{abs(answer.ahead):.1f} s {'ahead' if answer.ahead > 0 else 'behind'}"
    tool = "sudo sntp -sS time.apple.com" if mac else "sudo timedatectl set-ntp true"
    findings.add("clock", host.name, clock, not late, typed_for(host, tool) if late else "")


def _memory(host: Host, own: Node, findings: Findings) -> None:
    """What the machine has beside what its line says."""
    said, found, mend = host.memory_bytes, amount(own.memory_bytes), ""
    if said is not None and abs(said - own.memory_bytes) > MEMORY_TOLERANCE * own.memory_bytes:
        found += f", and the hostfile says {amount(said)}"
        mend = f"memory={max(1, own.memory_bytes // GIB)}GiB in its line"
    more_than_there_is = bool(mend) and (said or 0) > own.memory_bytes
    findings.add("memory", host.name, found, not more_than_there_is, mend)
    limit, mend = amount(own.limit_bytes), ""
    if host.limit_bytes is not None and host.limit_bytes > own.limit_bytes:
        limit += f", and the hostfile says {amount(host.limit_bytes)}; the smaller one counts"
        if own.chip is not None:
            mend = typed_for(host, raising(host.limit_bytes))
    findings.add("what the GPU may use", host.name, limit, mend=mend)


def _mac_rows(mac: Mapping[str, Any], folder: str) -> Iterator[tuple[str, str, str]]:
    """(what, found, the command that would make it better) of what only macOS has; `folder`: where runs go."""
    power, path = mac.get("power") or {}, shlex.quote(os.path.join(os.getcwd(), folder))
    if mac.get("wired_limit_mb") is not None:
        yield "iogpu.wired_limit_mb (0: macOS's own)", str(mac["wired_limit_mb"]), ""
    if (minutes := power.get("sleep")) is not None:
        yield "sleeps", *((f"after {minutes} min", "sudo pmset -a sleep 0") if minutes else ("never", ""))
    if (minutes := power.get("displaysleep")) is not None:
        sleeps = (f"after {minutes} min", "") if minutes else ("never", "sudo pmset -a displaysleep 10")
        yield "its display sleeps", *sleeps
    if (on := power.get("autorestart")) is not None:
        yield (
            "starts again after a power cut",
            *(("yes", "") if on else ("no", "sudo pmset -a autorestart 1")),
        )
    if (on := mac.get("filevault")) is not None:
        locked = (
            "on: after a power cut somebody has to log in there before ssh answers, not after a restart by:"
        )
        yield "FileVault", *((locked, "sudo fdesetup authrestart") if on else ("off", ""))
    if mac.get("updates") == 1:
        off = f"sudo defaults write {UPDATES} 0"
        yield "macOS installs updates by itself", "yes, and restarts", off
    if mac.get("firewall"):
        yield "firewall", "on: it has to let Python through (System Settings, Network)", ""
    if mac.get("excluded") is False:
        yield "Time Machine copies runs", "yes", f"tmutil addexclusion {path}"
    if mac.get("indexed"):
        yield "Spotlight reads runs", "yes", f"touch {path}/{SPOTLIGHT}"


def _setup() -> str:
    return f"cd {shlex.quote(os.getcwd())} && git pull && make setup"


def compare_all(answers: Mapping[str, MachineAnswer], findings: Findings) -> None:
    """What must be the same on all machines."""
    known = {name: answer for name, answer in answers.items() if answer.facts}
    facts: dict[str, dict[str, str]] = {}
    for name, answer in known.items():
        facts[name] = {k: str(v) for k, v in (_part(answer, "versions") or {}).items() if v is not None}
        digest = _part(answer, "package")
        if digest is not None:
            facts[name]["package"] = str(digest)[:12]
        system = (_part(answer, "mac") or {}).get("system") or {}
        facts[name] |= {f"macOS {key}": str(value) for key, value in system.items()}
    names = list(dict.fromkeys(fact for one in facts.values() for fact in one))
    odd = [fact for fact in names if len({one.get(fact) for one in facts.values()}) > 1]
    same = ", ".join(f"{fact} {next(iter(facts.values()))[fact]}" for fact in names if fact not in odd)
    if same:
        findings.add("the same on all that answer", "all", same)
    first = next(iter(facts), "")
    for fact in odd:
        for name, one in facts.items():
            if one.get(fact) != facts[first].get(fact):
                command = "softwareupdate --list" if fact.startswith("macOS") else _setup()
                mend = typed_for(known[name].host, command)
                found = f"{one.get(fact, 'none')}, and {facts[first].get(fact, 'none')} on {first}"
                findings.add(fact, name, found, False, mend)


def thunderbolt(answers: Mapping[str, MachineAnswer], findings: Findings) -> None:
    """Which machines a Thunderbolt cable joins, which only macOS says."""
    ends = {
        port["id"]: (name, port)
        for name, answer in answers.items()
        for port in (_part(answer, "mac") or {}).get("thunderbolt") or ()
    }
    for name, port in ends.values():
        if port["other"] is not None:
            other = ends.get(port["other"], ("a machine outside the hostfile", {}))[0]
            findings.add(
                f"Thunderbolt port {port['port']}", name, f"to {other}, {port['speed'] or 'speed not known'}"
            )
