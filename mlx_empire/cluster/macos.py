"""What macOS's own commands say of a Mac: which are asked, and how their text is read.

One function runs a named command and reads what it prints (`read_mac`); the readers are pure and give None, or leave a
name out, where the text does not say. Not run in CI: only macOS has the commands; tests read texts as macOS prints
them.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Run = Callable[
    [Sequence[str]], str
]  # the standard output of a command; OSError or SubprocessError where it fails
Reader = Callable[[str], Any]
SECONDS = 20.0


def read_sw_vers(text: str) -> dict[str, str]:
    """`version` and `build` of macOS in the output of `sw_vers`."""
    names = {"ProductVersion": "version", "BuildVersion": "build"}
    found = re.findall(r"^(\w+):\s*(\S+)\s*$", text, re.MULTILINE)
    return {names[name]: value for name, value in found if name in names}


def read_swapusage(text: str) -> int | None:
    """Bytes of swap in use in the output of `sysctl vm.swapusage`."""
    used = re.search(r"used = ([0-9.]+)([KMG])", text)
    return None if used is None else int(float(used[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[used[2]])


def read_number(text: str) -> int | None:
    """The number that is all of the text."""
    return int(text) if re.fullmatch(r"\s*\d+\s*", text) else None


def read_pmset(text: str) -> dict[str, int]:
    """The settings in the output of `pmset -g`: `sleep` and `displaysleep` in minutes (0: never), `autorestart`."""
    return {name: int(value) for name, value in re.findall(r"^\s*(\w+)\s+(\d+)\b", text, re.MULTILINE)}


def read_on_or_off(text: str) -> bool | None:
    """Whether "FileVault is On." or "Firewall is enabled." says so."""
    found = re.search(r"\bis (on|off|enabled|disabled)\b", text, re.IGNORECASE)
    return None if found is None else found[1].lower() in ("on", "enabled")


def read_thunderbolt(text: str) -> list[dict[str, str | None]]:
    """The Thunderbolt ports in the JSON of `system_profiler SPThunderboltDataType -json`.

    Of each: `port` (the number on the case), `speed` as macOS writes it, `id` of this end, and `other`, the id of the
    Mac at the other end; None where there is none.
    """
    try:
        buses = json.loads(text)["SPThunderboltDataType"]
        found = []
        for bus in buses:
            port: dict[str, str] = next((bus[name] for name in bus if name.startswith("receptacle_")), {})
            others = [item["domain_uuid_key"] for item in bus.get("_items", []) if "domain_uuid_key" in item]
            found.append(
                {
                    "port": port.get("receptacle_id_key"),
                    "speed": port.get("current_speed_key"),
                    "id": bus.get("domain_uuid_key"),
                    "other": others[0] if others else None,
                }
            )
        return found
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def read_excluded(text: str) -> bool | None:
    """Whether `tmutil isexcluded FOLDER` says that Time Machine leaves the folder out."""
    found = re.search(r"^\[(Excluded|Included)\]", text, re.MULTILINE)
    return None if found is None else found[1] == "Excluded"


def read_vm_stat(text: str) -> int | None:
    """Wired bytes in the output of `vm_stat`; None where it does not say."""
    page = re.search(r"page size of (\d+) bytes", text)
    wired = re.search(r"Pages wired down:\s+(\d+)", text)
    return int(page[1]) * int(wired[1]) if page and wired else None


SPOTLIGHT = ".metadata_never_index"  # a file of this name keeps Spotlight out of its folder
_UPDATES = "/Library/Preferences/com.apple.SoftwareUpdate"
QUESTIONS: dict[str, tuple[Sequence[str], Reader]] = {
    "system": (["/usr/bin/sw_vers"], read_sw_vers),
    "swap_bytes": (["/usr/sbin/sysctl", "-n", "vm.swapusage"], read_swapusage),
    "wired_limit_mb": (["/usr/sbin/sysctl", "-n", "iogpu.wired_limit_mb"], read_number),
    "power": (["/usr/bin/pmset", "-g"], read_pmset),
    "firewall": (["/usr/libexec/ApplicationFirewall/socketfilterfw", "--getglobalstate"], read_on_or_off),
    "filevault": (["/usr/bin/fdesetup", "status"], read_on_or_off),
    "updates": (["/usr/bin/defaults", "read", _UPDATES, "AutomaticallyInstallMacOSUpdates"], read_number),
    "thunderbolt": (["/usr/sbin/system_profiler", "SPThunderboltDataType", "-json"], read_thunderbolt),
}


def read_mac(run: Run, folder: str) -> dict[str, Any]:
    """What each command of QUESTIONS says, and whether Time Machine leaves `folder` out; None for one that fails.

    `indexed`: whether Spotlight reads the folder; None where that is not there yet.
    """
    asked = QUESTIONS | {"excluded": (["/usr/bin/tmutil", "isexcluded", folder], read_excluded)}
    place = Path(folder)
    found: dict[str, Any] = {"indexed": not (place / SPOTLIGHT).exists() if place.is_dir() else None}
    for name, (command, read) in asked.items():
        try:
            found[name] = read(run(command))
        except (OSError, subprocess.SubprocessError):
            found[name] = None
    return found


def run_here(command: Sequence[str]) -> str:
    """See `Run`: on this machine."""
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout
