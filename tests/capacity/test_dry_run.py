"""`train --dry-run`: the report and nothing else, alone and with a true measurement of each rank under mpirun."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from support.mpi import launch_ranks

from mlx_empire.cluster.machine import measure_this_machine

ROOT = Path(__file__).resolve().parents[2]


def test_alone_it_says_what_the_capacity_command_says(recipe, say, hosts, tmp_path):
    file = hosts("king slots=1 # role=king memory=512GiB", "soldier slots=1 # role=soldier memory=256GiB")
    command = [sys.executable, "-m", "mlx_empire.train", recipe, "--dry-run", "--hosts", file, "run.steps=7"]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    expected = say(recipe, "--hosts", file, "run.steps=7")
    assert (done.returncode, done.stderr) == (0, "")
    assert without_dates(done.stdout) == without_dates(expected.out)
    assert not (tmp_path / "run").exists()


def test_under_mpirun_each_rank_has_its_measured_part_and_one_rank_speaks(recipe):
    launch = launch_ranks(2, "mlx_empire.capacity", [recipe, "--json"])
    assert launch.returncode == 0, launch.stderr
    own = measure_this_machine()
    nodes = json.loads(launch.stdout)["nodes"]
    assert [node["limit_bytes"] for node in nodes] == [own.limit_bytes // 2] * 2
    assert [node["memory_bytes"] for node in nodes] == [own.memory_bytes // 2] * 2


def test_under_mpirun_what_does_not_fit_ends_every_rank_with_3(recipe, hosts):
    file = hosts("localhost slots=2 # memory=1GiB limit=2MiB")
    launch = launch_ranks(2, "mlx_empire.train", [recipe, "--dry-run", "--hosts", file])
    assert launch.returncode == 3, launch.stderr
    assert launch.stdout.count("at the worst moment of a step") == 1
    assert "Traceback" not in launch.stderr


def without_dates(text: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\d", "", text)
