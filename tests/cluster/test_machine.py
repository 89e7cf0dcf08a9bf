"""What this machine can hold, against the kernel's own words and hand-made control groups."""

import socket
import sys
from pathlib import Path

import pytest

from mlx_empire.cluster.hostfile import default_limit
from mlx_empire.cluster.machine import cgroup_limit, measure_this_machine

NO_LIMIT = 2**63


def test_this_machine() -> None:
    node = measure_this_machine()
    assert node.name == socket.gethostname()
    assert 0 < node.limit_bytes <= node.memory_bytes
    if sys.platform == "linux":
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        installed = int(lines["MemTotal"].split()[0]) * 1024
        assert node.memory_bytes <= installed
        assert node.limit_bytes == default_limit(node.memory_bytes)


def group(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, NO_LIMIT),
        ({"a/b": "max\n"}, NO_LIMIT),
        ({"a/b": "4096\n"}, 4096),
        ({"a/b": "max\n", "a": "8192\n"}, 8192),
        ({"a/b": "4096\n", "a": "8192\n"}, 4096),
        ({".": "1024\n"}, 1024),
        ({"a/b": "not a number\n"}, NO_LIMIT),
        ({"other": "16\n"}, NO_LIMIT),
    ],
)
def test_control_groups_of_both_versions(tmp_path: Path, limits: dict[str, str], expected: int) -> None:
    for version, line, root, name in (
        (2, "0::/a/b\n", tmp_path / "2", "memory.max"),
        (1, "9:cpu:/x\n4:memory:/a/b\n", tmp_path / "1", "memory.limit_in_bytes"),
    ):
        base = root / "memory" if version == 1 else root
        for folder, text in limits.items():
            group(base / folder, name, text)
        membership = tmp_path / f"cgroup{version}"
        membership.write_text(line)
        assert cgroup_limit(membership, root) == expected


def test_without_control_groups(tmp_path: Path) -> None:
    assert cgroup_limit(tmp_path / "missing", tmp_path) == NO_LIMIT
