"""What this machine can hold, against the kernel's own words and hand-made control groups."""

import socket
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_empire.cluster import machine
from mlx_empire.cluster.hostfile import default_limit
from mlx_empire.cluster.machine import cgroup_limit, measure_this_machine
from mlx_empire.errors import UserError

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


METAL = {
    "device_name": "Apple M3 Ultra",
    "architecture": "applegpu_g15d",
    "max_recommended_working_set_size": 384 << 30,
    "memory_size": 512 << 30,
}
CUDA = {
    "device_name": "NVIDIA H200",
    "architecture": "sm_90",
    "total_memory": 140 << 30,
    "free_memory": 1 << 30,
}


@pytest.mark.parametrize(
    ("info", "mac", "memory", "limit", "compiles"),
    [
        (METAL, "15.5", 512 << 30, 384 << 30, "applegpu_g15d under macOS 15.5"),
        (CUDA, "", 140 << 30, 133 << 30, "sm_90 under Linux"),
    ],
)
def test_the_gpu_is_asked_and_not_the_host(
    monkeypatch: pytest.MonkeyPatch, info: dict[str, object], mac: str, memory: int, limit: int, compiles: str
) -> None:
    monkeypatch.setattr(machine.mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(machine.mx, "device_info", lambda: info)
    monkeypatch.setattr(machine.platform, "mac_ver", lambda: (mac, ("", "", ""), "arm64"))
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    monkeypatch.setattr(machine, "_installed_memory", lambda: 512 << 30)
    monkeypatch.setattr(machine, "cgroup_limit", lambda *places: NO_LIMIT)
    node = measure_this_machine()
    assert (node.memory_bytes, node.limit_bytes, node.chip) == (memory, limit, info["device_name"])
    assert node.compiles == compiles
    assert node.measured


def test_a_macos_that_mlx_does_not_support_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "mac_ver", lambda: ("13.6.1", ("", "", ""), "arm64"))
    with pytest.raises(UserError, match=r"macOS 13\.6\.1: MLX needs macOS 14 or newer"):
        measure_this_machine()
    monkeypatch.setattr(machine.platform, "mac_ver", lambda: ("14.7", ("", "", ""), "arm64"))
    assert measure_this_machine().measured
