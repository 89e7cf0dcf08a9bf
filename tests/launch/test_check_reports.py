"""hosts/check.py, doctor --train, prints its table and writes its file whatever fails; no secret is in either."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.mpi import ROOT, rank_environment


@pytest.mark.parametrize("host", ["localhost slots=1 # memory=1GiB limit=2MiB"])
def test_a_launch_that_is_refused_is_a_row_of_the_table(host: str, tmp_path: Path) -> None:
    """The limit is below what the tiny model needs."""
    (tmp_path / "hosts.txt").write_text(f"{host}\n")
    ended = subprocess.run(
        [sys.executable, "hosts/check.py", str(tmp_path / "hosts.txt"), "--dir", str(tmp_path / "check")],
        cwd=ROOT,
        env=rank_environment(
            str(tmp_path), {"COLUMNS": "200", "HF_TOKEN": "canary", "MY_PASSWORD": "canary"}
        ),
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    said = json.loads((tmp_path / "check" / "check.json").read_text())
    assert not said["good"]
    rows = {row["what"]: row for row in said["found"]}
    assert rows["a run over all machines"] | {"where": ""} == {
        "what": "a run over all machines",
        "where": "",
        "found": "exit code 3",
        "good": False,
        "mend": "",
    }
    assert rows["the device"]["good"]
    for text in (ended.stdout, json.dumps(said)):
        assert "canary" not in text
    assert "exit code 3" in ended.stdout
