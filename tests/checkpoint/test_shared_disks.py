"""Machines whose checkpoint folders lie on one disk are known to share it, also where the folders differ."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mlx_empire.checkpoint import agree
from mlx_empire.checkpoint.agree import Folders, find_folders
from mlx_empire.disk import mount_point

HOSTS = ("king", "soldier", "page")


class Machine:
    """A rank as a thread, on a machine of its own name."""

    def __init__(self, rank: int, said: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.hostnames, self.hostname = rank, len(said), list(HOSTS), HOSTS[rank]
        self._said, self._barrier = said, barrier

    def gather_json(self, value: Any) -> list[Any]:
        self._said[self.rank] = json.dumps(value)
        self._barrier.wait()
        found = [json.loads(one) for one in self._said]
        self._barrier.wait()
        return found

    def broadcast_json(self, value: Any) -> Any:
        return self.gather_json(value)[0]


def found(roots: Sequence[Path]) -> list[Folders]:
    """What each machine finds, with its own folder."""
    said: list[Any] = [None] * len(roots)
    barrier = threading.Barrier(len(roots), timeout=30)

    def find(rank: int) -> Folders:
        machine: Any = Machine(rank, said, barrier)
        return find_folders(machine, roots[rank])

    with ThreadPoolExecutor(len(roots)) as pool:
        return list(pool.map(find, range(len(roots))))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system only")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_one_folder_and_folders_beside_each_other_are_on_one_disk(tmp_path: Path) -> None:
    each = found([tmp_path / "a", tmp_path / "b" / "deep", tmp_path / "a"])
    (disk,) = {disk for one in each for disk in one.disks}
    assert disk.startswith("king:")
    assert {one.leaders for one in each} == {(0, 1, 0)}
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "no probe is left"


def test_a_disk_that_a_machine_sees_and_does_not_write_to_is_not_its_own(
    tmp_path: Path, elsewhere: Path
) -> None:
    """The first machine's folder can be seen by its path on the second, whose own lies on another disk."""
    for one in found([tmp_path / "a", elsewhere / "b", tmp_path / "c"]):
        king, soldier, page = one.disks
        assert king == page
        assert king.startswith("king:")
        assert soldier.startswith("soldier:")


def test_the_mount_point_is_that_of_the_folder_and_not_of_a_link_to_it(
    tmp_path: Path, elsewhere: Path
) -> None:
    (tmp_path / "link").symlink_to(elsewhere)
    assert mount_point(elsewhere) == mount_point(tmp_path / "link") == Path("/dev/shm")


def test_a_disk_that_is_mounted_elsewhere_is_found_below_its_mount_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same disk is /one of the first machine and /two of the second: links stand for the two mounts."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounts = [tmp_path / "one", tmp_path / "two"]
    for mount in mounts:
        mount.symlink_to(disk)
    monkeypatch.setattr(agree, "mount_point", lambda root: next(m for m in mounts if root.is_relative_to(m)))
    monkeypatch.setattr(Path, "resolve", lambda self, strict=False: self)
    monkeypatch.setattr(
        agree, "_is_beside", lambda root, probe: probe.is_relative_to(root.parent) and probe.exists()
    )
    for one in found([mounts[0] / "a", mounts[1] / "b"]):
        assert one.leaders == (0, 1)
        assert len(set(one.disks)) == 1
