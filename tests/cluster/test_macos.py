"""What macOS's commands print is read, also where they print something else. The texts are as macOS prints them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from mlx_empire.cluster import macos

SW_VERS = "ProductName:\t\tmacOS\nProductVersion:\t\t26.1\nBuildVersion:\t\t25B78\n"
SWAP = "total = 3072.00M  used = 1536.50M  free = 1535.50M  (encrypted)\n"
PMSET = """\
System-wide power settings:
 DestroyFVKeyOnStandby		0
Currently in use:
 standby              0
 Sleep On Power Button 1
 autorestart          1
 powernap             1
 displaysleep         10
 womp                 1
 sleep                1 (sleep prevented by caffeinate, powerd, coreaudiod)
"""
FIREWALL = "Firewall is enabled. (State = 1) \n"
THUNDERBOLT = {
    "SPThunderboltDataType": [
        {
            "_items": [{"_name": "Mac Studio", "domain_uuid_key": "B", "device_name_key": "Mac Studio"}],
            "_name": "thunderboltusb5_bus_0",
            "device_name_key": "Mac Studio",
            "domain_uuid_key": "A",
            "receptacle_1_tag": {
                "current_speed_key": "Up to 80 Gb/s",
                "link_status_key": "0x2",
                "receptacle_id_key": "1",
                "receptacle_status_key": "receptacle_connected",
            },
        },
        {
            "_name": "thunderboltusb5_bus_1",
            "domain_uuid_key": "C",
            "receptacle_1_tag": {"receptacle_id_key": "2"},
        },
    ]
}
PORTS = [
    {"port": "1", "speed": "Up to 80 Gb/s", "id": "A", "other": "B"},
    {"port": "2", "speed": None, "id": "C", "other": None},
]
SAID = {
    "system": (SW_VERS, {"version": "26.1", "build": "25B78"}),
    "swap_bytes": (SWAP, int(1536.5 * 2**20)),
    "wired_limit_mb": ("475136\n", 475136),
    "firewall": (FIREWALL, True),
    "filevault": ("FileVault is Off.\n", False),
    "updates": ("1\n", 1),
    "thunderbolt": (json.dumps(THUNDERBOLT), PORTS),
}


@pytest.mark.parametrize("name", SAID)
def test_a_commands_words_are_read(name: str) -> None:
    text, expected = SAID[name]
    assert macos.QUESTIONS[name][1](text) == expected


def test_power_settings_are_read_whatever_stands_behind_them() -> None:
    found = macos.read_pmset(PMSET)
    assert {name: found[name] for name in ("sleep", "displaysleep", "autorestart")} == {
        "sleep": 1,
        "displaysleep": 10,
        "autorestart": 1,
    }


@pytest.mark.parametrize("name", macos.QUESTIONS)
@pytest.mark.parametrize("text", ["", "command not found\n", "{", "[]", '{"SPThunderboltDataType": [3]}'])
def test_other_words_say_nothing(name: str, text: str) -> None:
    assert macos.QUESTIONS[name][1](text) in (None, {}, [])


def test_whether_time_machine_leaves_a_folder_out_is_read() -> None:
    assert macos.read_excluded("[Excluded]    /Users/me/runs\n") is True
    assert macos.read_excluded("[Included]    /Users/me/runs\n") is False
    assert macos.read_excluded("/Users/me/runs: No such file\n") is None


def test_a_command_that_fails_leaves_the_others_answers() -> None:
    asked: list[Sequence[str]] = []

    def run(command: Sequence[str]) -> str:
        asked.append(command)
        if command[0] == "/usr/bin/pmset":
            raise subprocess.CalledProcessError(1, command)
        return {"/usr/bin/sw_vers": SW_VERS, "/usr/bin/tmutil": "[Included] runs\n"}.get(command[0], "")

    found = macos.read_mac(run, "runs")
    assert (found["system"]["build"], found["power"], found["excluded"]) == ("25B78", None, False)
    assert ["/usr/bin/tmutil", "isexcluded", "runs"] in asked
    assert all(command[0].startswith("/") for command in asked)  # no PATH of a bare shell over there


def test_spotlight_reads_a_folder_that_does_not_forbid_it(tmp_path: Path) -> None:
    def indexed(folder: Path) -> bool | None:
        found: bool | None = macos.read_mac(lambda command: "", str(folder))["indexed"]
        return found

    assert (indexed(tmp_path), indexed(tmp_path / "runs")) == (True, None)
    (tmp_path / ".metadata_never_index").touch()
    assert indexed(tmp_path) is False
