"""The script for people with Macs runs through here too, but for what only macOS has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.mpi import ROOT, rank_environment


@pytest.mark.faults
def test_everything_is_as_it_should_be(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "hosts/check.py", "hosts/local.txt", "--dir", str(tmp_path / "check")],
        cwd=ROOT,
        env=rank_environment(str(tmp_path), {"COLUMNS": "200"}),
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert "was killed by SIGKILL" in ended.stderr
    assert "the same bits" in ended.stdout
    assert "GB/s" in ended.stdout
