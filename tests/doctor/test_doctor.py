"""Every way in which a machine does not answer, or answers what would stop a run, is a row with the line that mends it.

A fake ssh on the PATH plays the machines: words on standard error, or the facts that a machine would print.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from doctor.played import GIB, Played
from support.mpi import ROOT

from mlx_empire.cluster.hostfile import Host, Node
from mlx_empire.doctor import command, judge
from mlx_empire.doctor.asking import LOCAL_NETWORK, why
from mlx_empire.doctor.facts import facts, swap_in_use

CHANGED = (
    "@@@@@@@\n@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\n@@@@@@@\nHost key verification failed."
)
NO_PYTHON = f"/bin/sh: 1: exec: {sys.executable}: not found"
# Name of a machine -> (what its ssh says, what doctor finds, the line that mends it).
FAILURES = {
    "changed.invalid": (CHANGED, "its host key is another one than before", "ssh-keygen -R changed.invalid"),
    "unknown.invalid": (
        "Host key verification failed.",
        "its host key is not known here",
        "ssh unknown.invalid once",
    ),
    "refused.invalid": (
        "Permission denied (publickey,password).",
        "it refuses our key",
        "ssh-copy-id refused.invalid",
    ),
    "closed.invalid": (
        "connect to host closed.invalid port 22: Connection refused",
        "nothing listens",
        "Remote Login",
    ),
    "asleep.invalid": (
        "connect to host asleep.invalid port 22: Operation timed out",
        "does not answer",
        "wake it",
    ),
    "gone.invalid": (
        "connect to host gone.invalid port 22: No route to host",
        "no route to it",
        "turn it on",
    ),
    "misspelt.invalid": (
        "Could not resolve hostname misspelt.invalid",
        "its name is not known",
        "`hostname` prints",
    ),
    "bare.invalid": (NO_PYTHON, "no Python at the same path", "make setup"),
    "old.invalid": ("ModuleNotFoundError: No module named 'mlx'", "lacks a package", "make setup"),
    "empty.invalid": (
        "/bin/sh: 1: cd: can't cd to /x",
        "no such folder there",
        "put this folder at the same path",
    ),
    "odd.invalid": (
        "kex_exchange_identification: read",
        "does not answer as it should",
        "ssh odd.invalid true",
    ),
}


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    for name in ("PRTE_MCA_plm_ssh_agent", "OMPI_MCA_plm_rsh_agent"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(judge, "resolved", lambda _: "10.0.0.1")
    return Played(tmp_path)


def row(rows: list[dict[str, Any]], what: str, where: str) -> dict[str, Any]:
    (found,) = [one for one in rows if (one["what"], one["where"]) == (what, where)]
    return found


def test_each_failure_of_ssh_is_named_with_what_mends_it(
    played: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (said, _, _) in FAILURES.items():
        played.silent(name, said)
    played.answering("sound.invalid")
    code, rows = played.doctor()
    assert code == 1
    for name, (said, reason, mend) in FAILURES.items():
        found = row(rows, "ssh", name)
        assert not found["good"]
        assert reason in found["found"], name
        assert said.split()[-1] in found["found"], name
        assert mend in found["mend"], name
    assert row(rows, "ssh", "sound.invalid")["good"]
    table = capsys.readouterr().out
    assert all(name in table for name in FAILURES)
    assert "ssh, refused.invalid: ssh-copy-id refused.invalid" in table


def test_a_machine_that_answers_pings_but_has_no_route_needs_the_local_network_permission() -> None:
    said = "ssh: connect to host king port 22: No route to host"
    assert why(Host("king"), said, lambda _: True)[1] == LOCAL_NETWORK
    assert why(Host("king"), said, lambda _: False)[1] == "turn it on, and look at its cable and network"


def test_a_mend_reaches_a_machine_as_the_hostfile_does(played: Played) -> None:
    played.silent("me@refused.invalid port=2222", "Permission denied (publickey).")
    _, rows = played.doctor()
    assert row(rows, "ssh", "refused.invalid")["mend"] == "ssh-copy-id -p 2222 me@refused.invalid"


def test_sound_machines_are_good(played: Played) -> None:
    played.answering("king.invalid", "# memory=64GiB limit=48GiB", reached={"soldier.invalid": ""})
    played.answering(
        "soldier.invalid",
        "port=2222 # memory=64GiB limit=40GiB",
        reached={"king.invalid": "Connection refused"},
    )
    code, rows = played.doctor()
    assert (code, [one for one in rows if one["mend"]]) == (0, [])
    assert (
        row(rows, "the same on all that answer", "all")["found"]
        == "mlx 0.32.4, python 3.11, package aaaaaaaaaaaa"
    )
    asked = (played.folder / "asked").read_text()
    assert "-p 2222 soldier.invalid" in asked
    assert shlex.quote(sys.executable) in asked
    question = json.loads((played.folder / "question-king.invalid").read_text())
    assert question == {"folders": ["runs"], "others": {"soldier.invalid": 2222}, "speed": False}


@pytest.mark.parametrize(
    ("line", "more", "what", "found", "good", "mend"),
    [
        ("", {"hostname": "king-2.other"}, "hostname", "is not in the hostfile", False, "scutil --set HostName odd"),
        ("", {"versions": {"mlx": "0.3", "python": "3.11"}}, "mlx", "0.3, and 0.32.4 on king", False, "make setup"),
        ("", {"package": "b" * 64}, "package", "bbbbbbbbbbbb, and aaaaaaaaaaaa", False, "git pull && make setup"),
        ("", {"clock": time.time() + 3600}, "clock", "s ahead", False, "timedatectl set-ntp true"),
        ("", {"swap_bytes": 9 * GIB}, "swap in use", "9.00 GiB", True, "restart it before a long run"),
        ("# memory=128GiB limit=48GiB", {}, "memory", "64.0 GiB, and the hostfile says 128 GiB", False, "memory=64GiB"),
        (
            "# memory=64GiB limit=60GiB", {}, "what the GPU may use", "48.0 GiB, and the hostfile says 60.0 GiB", True,
            "sudo sysctl iogpu.wired_limit_mb=61440",
        ),
        ("", {"reached": {"king.invalid": "Operation timed out"}}, "reaches king.invalid", "out", False, "ssh king"),
        ("", {"device": {"problem": "RuntimeError: no GPU"}}, "device", "no GPU", False, "make setup"),
    ],
)  # fmt: skip
def test_what_is_odd_about_a_machine_is_a_row_of_its_own(
    played: Played, line: str, more: dict[str, Any], what: str, found: str, good: bool, mend: str
) -> None:
    played.answering("king.invalid")
    played.answering("odd.invalid", line, **more)
    _, rows = played.doctor()
    one = row(rows, what, "odd.invalid")
    assert found in one["found"]
    assert one["good"] == good
    assert mend in one["mend"]
    assert [other for other in rows if other["where"] == "king.invalid" and other["mend"]] == []


def mac(**more: Any) -> dict[str, Any]:
    """The facts of a Mac that is ready for ten days."""
    power = {"sleep": 0, "displaysleep": 10, "autorestart": 1}
    system = {"version": "26.1", "build": "25B78"}
    sound = {
        "power": power,
        "system": system,
        "firewall": False,
        "filevault": False,
        "updates": 0,
        "excluded": True,
        "indexed": False,
    }
    return sound | {"swap_bytes": 0, "wired_limit_mb": 0, "thunderbolt": []} | more


def test_what_only_macos_has_is_told_by_machine(played: Played) -> None:
    port = {"port": "1", "speed": "Up to 80 Gb/s", "id": "K", "other": "S"}
    played.answering("king.invalid", mac=mac(thunderbolt=[port]))
    power = {"sleep": 10, "displaysleep": 0, "autorestart": 0}
    odd = mac(
        power=power,
        system={"version": "26.0", "build": "25A354"},
        thunderbolt=[{"port": "3", "speed": None, "id": "S", "other": "K"}],
        filevault=True,
        updates=1,
        excluded=False,
        indexed=True,
    )
    played.answering("odd.invalid", mac=odd, reached={"king.invalid": "No route to host"})
    _, rows = played.doctor()
    assert [one["what"] for one in rows if one["where"] == "king.invalid" and one["mend"]] == []
    mends = {one["what"]: one["mend"] for one in rows if one["where"] == "odd.invalid" and one["mend"]}
    assert mends["sleeps"] == "ssh -t odd.invalid sudo pmset -a sleep 0"
    assert "displaysleep 10" in mends["its display sleeps"]
    assert "autorestart 1" in mends["starts again after a power cut"]
    assert "authrestart" in mends["FileVault"]
    assert "AutomaticallyInstallMacOSUpdates 0" in mends["macOS installs updates by itself"]
    assert mends["Time Machine copies runs"] == f"ssh -t odd.invalid tmutil addexclusion {Path.cwd()}/runs"
    assert (
        mends["Spotlight reads runs"] == f"ssh -t odd.invalid touch {Path.cwd()}/runs/.metadata_never_index"
    )
    assert mends["reaches king.invalid"] == LOCAL_NETWORK
    assert row(rows, "macOS build", "odd.invalid")["found"] == "25A354, and 25B78 on king.invalid"
    assert row(rows, "Thunderbolt port 1", "king.invalid")["found"] == "to odd.invalid, Up to 80 Gb/s"


def test_a_recipe_is_held_against_memory_and_disks_as_they_are(played: Played) -> None:
    played.answering("king.invalid", disks={"runs": 900 * GIB, "models": 800 * GIB})
    played.answering("small.invalid", disks={"runs": 1 << 20, "models": 900 * GIB})
    model = f"model: {{path: {ROOT}/tests/fixtures/tiny-llama-260k}}"
    words = [model, "data: {path: data, sequence_length: 64}", "batch: {global_size: 2}"]
    words += ["optimizer: {learning_rate: 1e-5}", "run: {dir: r, steps: 9, save_every: 3}"]
    (played.folder / "recipe.yaml").write_text("\n".join(words))
    code, rows = played.doctor("--recipe", str(played.folder / "recipe.yaml"))
    assert code == 1
    assert "of 48.0 GiB" in row(rows, "memory for the recipe", "king.invalid")["found"]
    assert "800 GiB are free" in row(rows, "disk for the recipe", "king.invalid")["found"]
    small = row(rows, "disk for the recipe", "small.invalid")
    assert (small["good"], "1.00 MiB" in small["found"]) == (False, True)
    assert "on another disk" in small["mend"]
    assert [one["where"] for one in rows if not one["good"]] == ["small.invalid"]


@pytest.mark.parametrize("error", [RuntimeError("of our own"), KeyboardInterrupt()])
def test_the_table_is_printed_whatever_fails(
    played: Played, error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(judge, "compare_all", fails)
    monkeypatch.setenv("HF_TOKEN", "canary")
    played.answering("king.invalid")
    code, rows = played.doctor()
    assert code == 1
    assert row(rows, "ssh", "king.invalid")["good"]
    assert row(rows, "this check", "here")["found"] in ("RuntimeError: of our own", "stopped by the keyboard")
    table = capsys.readouterr().out
    assert "king.invalid" in table
    assert "canary" not in table + json.dumps(rows)


def test_json_is_the_file_that_is_written_and_nothing_else(
    played: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    played.answering("king.invalid")
    played.doctor("--json")
    assert capsys.readouterr().out == (played.folder / "check/check.json").read_text()


def test_mlxs_hostfile_is_read_and_written_as_one_of_mpirun(played: Played) -> None:
    played.answering("king.invalid")
    hosts = {"backend": "jaccl", "hosts": [{"ssh": "king.invalid", "ips": ["10.0.0.1"], "rdma": [None]}]}
    (played.folder / "hosts.json").write_text(json.dumps(hosts))
    check = played.folder / "check"
    assert command.main([str(played.folder / "hosts.json"), "--no-links", "--dir", str(check)]) == 0
    assert (check / "hosts.txt").read_text() == "king.invalid slots=1\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.txt"], "nowhere.txt: cannot read this hostfile"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--write-links"], "--write-links: there is no hostfile"),
    ],
)
def test_wrong_usage_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="64"):
        command.main(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_this_machine_says_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = facts({"folders": [str(tmp_path / "not" / "there")], "others": {}, "speed": False})
    assert [name for name, value in found.items() if isinstance(value, dict) and "problem" in value] == []
    assert Node(**found["machine"]).memory_bytes > 0
    assert found["disks"][str(tmp_path / "not" / "there")] > 0
    assert len(found["package"]) == 64


def test_swap_is_read_from_linuxs_own_table() -> None:
    assert (
        swap_in_use("MemTotal: 1 kB\nSwapTotal:  2048 kB\nSwapFree:   1024 kB\nHugePages_Total: 0\n")
        == 1 << 20
    )
