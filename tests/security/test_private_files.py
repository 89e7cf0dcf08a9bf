"""Private files: mode 0600 whatever was there, through no link, and whole at any moment."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

import pytest

from mlx_empire import disk
from mlx_empire.disk import append_private, create_private, open_private, replace_private
from mlx_empire.errors import UserError
from mlx_empire.launch.detached import LOG, detach
from mlx_empire.run.stop import request_stop


def append(path: Path) -> None:
    with append_private(path) as file:
        file.write(b"more")


def create(path: Path) -> None:
    with create_private(path) as file:
        file.write(b"new")


WRITERS: dict[str, Callable[[Path], None]] = {
    "create": create,
    "append": append,
    "open": lambda path: os.close(open_private(path)),
    "replace": lambda path: replace_private(path, b"new"),
    "replace durably": lambda path: replace_private(path, "new", durable=True),
}


@pytest.fixture(params=[0o022, 0o777], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("name", WRITERS)
def test_a_new_file_is_its_owner_s_alone_whatever_the_umask(name: str, tmp_path: Path, umask: None) -> None:
    WRITERS[name](tmp_path / "file")
    assert mode(tmp_path / "file") == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "create"])
def test_a_file_that_others_could_read_becomes_private(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o644)
    WRITERS[name](path)
    assert mode(path) == 0o600


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("there", [True, False])
def test_no_link_is_followed(name: str, there: bool, tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    if there:
        target.write_text("keep")
        target.chmod(0o644)
    link.symlink_to(target)
    if name.startswith("replace"):
        WRITERS[name](link)
        assert link.read_text() == "new"
        assert not link.is_symlink()
    else:
        with pytest.raises(OSError) as caught:  # noqa: PT011
            WRITERS[name](link)
        assert caught.value.errno in (errno.ELOOP, errno.EEXIST)
    if there:
        assert target.read_text() == "keep"
        assert mode(target) == 0o644
    else:
        assert not target.exists()


def test_a_link_in_the_draft_s_place_is_not_followed_either(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("keep")
    (tmp_path / disk.draft_of("file")).symlink_to(target)
    replace_private(tmp_path / "file", "new")
    assert target.read_text() == "keep"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "target"]


def test_to_create_needs_a_free_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileExistsError):
        create_private(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"


def test_what_is_appended_comes_last_and_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old, ")
    with append_private(tmp_path / "file") as file:
        assert file.tell() == 5
        file.write(b"new")
        assert (tmp_path / "file").read_text() == "old, new", "nothing waits in a buffer"


@pytest.mark.parametrize("failing", ["write", "sync", "rename"])
def test_a_replacement_that_fails_leaves_the_old_file_and_no_draft(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full(FileIO):
        write = full  # type: ignore[assignment]

    if failing == "write":
        monkeypatch.setattr(os, "fdopen", Full)
    elif failing == "sync":
        monkeypatch.setattr(disk, "sync_file", full)
    else:
        monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        replace_private(tmp_path / "file", "new", durable=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}


def test_what_is_durable_is_synced_before_it_takes_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    rename = os.replace

    def renamed(source: Path, target: Path) -> None:
        seen.append("rename")
        rename(source, target)

    monkeypatch.setattr(disk, "sync_file", lambda file: seen.append("file"))
    monkeypatch.setattr(disk, "sync_folder", lambda folder: seen.append(f"folder {folder.name}"))
    monkeypatch.setattr(os, "replace", renamed)
    replace_private(tmp_path / "file", "new", durable=True)
    assert seen == ["file", "rename", f"folder {tmp_path.name}"]


def test_nothing_else_makes_private_files() -> None:
    package = Path(disk.__file__).parent
    words = ("os.O_CREAT", "os.O_WRONLY", "mkstemp")
    users = {path.name for path in package.rglob("*.py") if any(word in path.read_text() for word in words)}
    assert users == {"disk.py"}


def test_a_disk_without_modes_takes_new_files_and_no_old_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file that is made anew was never open to others; one that was there may be."""

    def refused(descriptor: int, mode: int) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fchmod", refused)
    create(tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == b"new"
    with pytest.raises(PermissionError):
        append(tmp_path / "new")


def test_a_link_where_a_stop_is_asked_for_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "stop").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"stop: .*make it possible to write there"):
        request_stop(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_a_link_where_the_launcher_s_log_goes_is_one_line(tmp_path: Path) -> None:
    (tmp_path / LOG).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{LOG}: .*remove it"):
        detach(tmp_path, [])
    assert not (tmp_path / "elsewhere").exists()
