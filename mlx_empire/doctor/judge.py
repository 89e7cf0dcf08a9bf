"""What the machines' answers mean: each by itself, all beside one another, and beside the hostfile.

A row is *no* where a run would be refused, hang or give wrong figures, and a *note* where it would only be slower, or
would not survive what happens in a house within ten days.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any

from mlx_empire.cluster.hostfile import Cluster, Host, Node
from mlx_empire.cluster.match import match_ranks
from mlx_empire.doctor.asking import LOCAL_NETWORK, NO_ROUTE, MachineAnswer, login, resolved
from mlx_empire.doctor.findings import Findings
from mlx_empire.errors import UserError
from mlx_empire.plan.wired_limit import raising
from mlx_empire.sizes import GIB, amount

CLOCK_SECONDS = 5.0
MEMORY_TOLERANCE = 0.05
SWAP_BYTES = GIB
SPOTLIGHT = ".metadata_never_index"


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
            _mac(host, mac, next(iter(_part(answer, "disks") or {"runs": 0})), findings)
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
            findings.add(name, host.name, str(value["problem"]), False, f"ssh {login(host)} '{_setup()}'")
    try:
        match_ranks(cluster, [str(answer.facts.get("hostname"))], [Node("", 1, None, 1, 1)])
        findings.add("hostname", host.name, str(answer.facts.get("hostname")))
    except UserError as error:
        keep = f"ssh -t {login(host)} sudo scutil --set HostName {shlex.quote(host.name)}, or write what it prints"
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
    findings.add("clock", host.name, clock, not late, f"ssh -t {login(host)} {tool}" if late else "")


def _memory(host: Host, own: Node, findings: Findings) -> None:
    """What the machine has beside what its line says."""
    said = host.memory_bytes
    wrong = said is not None and abs(said - own.memory_bytes) > MEMORY_TOLERANCE * own.memory_bytes
    found = amount(own.memory_bytes) + (f", and the hostfile says {amount(said)}" if wrong and said else "")
    line = f"memory={max(1, own.memory_bytes // GIB)}GiB in its line" if wrong else ""
    findings.add(
        "memory", host.name, found, not (wrong and said is not None and said > own.memory_bytes), line
    )
    limit, mend = amount(own.limit_bytes), ""
    if host.limit_bytes is not None and host.limit_bytes > own.limit_bytes:
        limit += f", and the hostfile says {amount(host.limit_bytes)}; the smaller one counts"
        if own.chip is not None:
            mend = f"ssh -t {login(host)} {raising(host.limit_bytes)}"
    findings.add("what the GPU may use", host.name, limit, mend=mend)


def _mac(host: Host, mac: Mapping[str, Any], folder: str, findings: Findings) -> None:
    """What only macOS has; `folder`: where runs go. Not run in CI."""
    there = f"ssh -t {login(host)} "
    power = mac.get("power") or {}

    def note(what: str, found: str, mend: str) -> None:
        findings.add(what, host.name, found, mend=there + mend if mend else "")

    limit = mac.get("wired_limit_mb")
    note("iogpu.wired_limit_mb (0: macOS's own)", "not known" if limit is None else str(limit), "")
    if "sleep" in power:
        never = power["sleep"] == 0
        note(
            "sleeps",
            "never" if never else f"after {power['sleep']} min",
            "" if never else "sudo pmset -a sleep 0",
        )
    if "displaysleep" in power:
        on = power["displaysleep"] == 0
        found = "never" if on else f"after {power['displaysleep']} min"
        note("its display sleeps", found, "sudo pmset -a displaysleep 10" if on else "")
    if "autorestart" in power:
        on = power["autorestart"] == 1
        note(
            "starts again after a power cut",
            "yes" if on else "no",
            "" if on else "sudo pmset -a autorestart 1",
        )
    vault = mac.get("filevault")
    if vault is not None:
        words = (
            "on: after a power cut somebody has to log in there before ssh answers, not after a restart by:"
        )
        note("FileVault", words if vault else "off", "sudo fdesetup authrestart" if vault else "")
    if mac.get("updates") == 1:
        tool = "sudo defaults write /Library/Preferences/com.apple.SoftwareUpdate AutomaticallyInstallMacOSUpdates 0"
        note("macOS installs updates by itself", "yes: it restarts", tool)
    if mac.get("firewall"):
        mend = "System Settings, Network, Firewall: let Python through, or ranks cannot reach one another"
        findings.add("firewall", host.name, "on", mend=mend)
    if mac.get("excluded") is False:
        path = shlex.quote(os.path.join(os.getcwd(), folder))
        words = f"tmutil addexclusion {path} && touch {path}/{SPOTLIGHT}"
        note("Time Machine copies runs", "yes", shlex.quote(words))


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
                mac = fact.startswith("macOS")
                there = login(known[name].host)
                mend = f"ssh {there} softwareupdate --list" if mac else f"ssh {there} '{_setup()}'"
                found = f"{one.get(fact, 'none')}, and {facts[first].get(fact, 'none')} on {first}"
                findings.add(fact, name, found, False, mend)


def thunderbolt(answers: Mapping[str, MachineAnswer], findings: Findings) -> None:
    """Which machines a Thunderbolt cable joins. Not run in CI: only macOS says so."""
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
