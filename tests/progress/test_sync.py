"""A file is on the disk also where macOS's strict call is not known: on network disks, on some outer ones."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mlx_empire import disk
from mlx_empire.disk import replace_private, sync_file


@pytest.mark.parametrize("refusal", [None, errno.ENOTSUP, errno.EINVAL, errno.ENOTTY])
def test_where_full_fsync_is_not_known_fsync_is_asked(
    refusal: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def full(descriptor: int, command: int) -> int:
        asked.append("full")
        if refusal is not None:
            raise OSError(refusal, os.strerror(refusal))
        return 0

    monkeypatch.setattr(disk.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(disk.fcntl, "fcntl", full)
    monkeypatch.setattr(disk.os, "fsync", lambda descriptor: asked.append("fsync"))
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x")
        sync_file(file)
    assert asked == ["full"] + ["fsync"] * (refusal is not None)
    replace_private(tmp_path / "other", "text", durable=True)
    assert (tmp_path / "other").read_text() == "text"


def test_a_disk_that_fails_is_still_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*words: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(disk.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(disk.fcntl, "fcntl", broken)
    monkeypatch.setattr(disk.os, "fsync", broken)
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match="Input/output"):
        sync_file(file)
