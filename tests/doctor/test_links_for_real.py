"""Three machines in network namespaces, two behind slower cards: what doctor measures is what `tc` lets through."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.mpi import ROOT, rank_environment
from support.namespaces import Machines, why_not

from mlx_empire.cluster.hostfile import load_hostfile

GIB = 1 << 30
MBIT = {"king": 240, "soldier1": 120, "soldier2": 60}
HOSTS = """\
# the empire
king slots=1      # role=king  memory=3GiB   mains, left rack
soldier1 slots=1  # link=9GB/s role=soldier

soldier2   slots=1
"""
REASON = why_not() or ("" if shutil.which("tc") else "no tc here")

pytestmark = [pytest.mark.faults, pytest.mark.skipif(bool(REASON), reason=REASON or "namespaces work here")]


def doctor(machines: Machines, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command on the king, for the hostfile in the folder, which gets its check."""
    command = [sys.executable, "-m", "mlx_empire.doctor", str(folder / "hosts.txt"), "--json", *words]
    return subprocess.run(
        machines.on("king", [*command, "--dir", str(folder / "check")]),
        cwd=ROOT,
        env=rank_environment(str(folder), machines.environment()),
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


def test_every_pair_is_as_fast_as_its_slower_card_and_the_hostfile_says_so(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts.txt"
    hostfile.write_text(HOSTS)
    with Machines(tmp_path, dict.fromkeys(MBIT, 3 * GIB)) as machines:
        for name, mbit in MBIT.items():
            machines.throttle(name, mbit)
        ended = doctor(machines, tmp_path, "--write-links")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    said = json.loads(ended.stdout)
    assert said == json.loads((tmp_path / "check" / "check.json").read_text())
    rows = said["found"]
    assert [row["good"] for row in rows if row["what"] == "ssh"] == [True] * 3, rows
    links = {row["where"]: float(row["found"].split()[0]) for row in rows if row["what"] == "link"}
    assert links == {
        f"{a} and {b}": pytest.approx(min(MBIT[a], MBIT[b]) / 8e3, rel=0.15)
        for a, b in itertools.combinations(MBIT, 2)
    }, rows
    hosts = load_hostfile(hostfile).nodes
    expected = {"king": 120, "soldier1": 120, "soldier2": 60}  # nobody saw more of the king's card
    assert {host.name: host.link_bytes_per_second for host in hosts} == {
        name: pytest.approx(mbit * 1e6 / 8, rel=0.15) for name, mbit in expected.items()
    }
    before, after = HOSTS.splitlines(), hostfile.read_text().splitlines()
    assert [after[0], after[3]] == [before[0], before[3]]
    assert after[1].startswith(before[1])
    assert after[4].startswith(before[4])
    assert (after[2].split()[0], after[2].split()[-1]) == ("soldier1", "role=soldier")


def test_a_machine_whose_cable_is_out_is_a_row_and_the_others_are_measured(tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text("king\nsoldier1\nsoldier2\n")
    with Machines(tmp_path, dict.fromkeys(MBIT, 3 * GIB)) as machines:
        machines.cut("soldier2")
        ended = doctor(machines, tmp_path)
    assert ended.returncode == 1
    rows = json.loads(ended.stdout)["found"]
    ssh = {row["where"]: row for row in rows if row["what"] == "ssh"}
    assert [ssh[name]["good"] for name in MBIT] == [True, True, False]
    assert ssh["soldier2"]["found"].startswith("no route to it")
    assert [row["where"] for row in rows if row["what"] == "link"] == ["king and soldier1"]
