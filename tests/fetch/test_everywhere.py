"""A fetched folder comes to the other machines over ssh: only what is missing there, checked there, or refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mlx_empire.cluster.hostfile import parse_hostfile
from mlx_empire.errors import DoesNotFitError, UnreachableError
from mlx_empire.fetch import everywhere
from mlx_empire.formats.fetched import RECORD, fetch_record

FILES = {
    "config.json": b"{}",
    "model-1.safetensors": b"weights" * 9999,
    "additional_chat_templates/a b.jinja": b"x",
}
RECORD_OF_ALL = {
    "source": "owner/model@main",
    "revision": "0" * 40,
    "files": {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in FILES.items()},
}
CLUSTER = parse_hostfile("localhost\nsoldier-1.invalid\n", "hosts.txt")
FOLDER = Path("models/small")
# What ssh does, for machines whose disks are folders beside this one's.
AGENT = """\
#!/bin/sh
machine=$1; shift
echo "$*" >> {disks}/said
exec sh -c "$(printf %s "$*" | sed "s#{disks}/king#{disks}/$machine#g")"
"""


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("king", "soldier-1.invalid"):
        (tmp_path / name).mkdir()
    for name, data in FILES.items():
        (tmp_path / "king" / FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "king" / FOLDER / name).write_bytes(data)
    (tmp_path / "agent").write_text(AGENT.format(disks=tmp_path))
    (tmp_path / "agent").chmod(0o700)
    monkeypatch.setenv("PRTE_MCA_plm_ssh_agent", str(tmp_path / "agent"))
    monkeypatch.chdir(tmp_path / "king")
    return tmp_path


def test_what_is_missing_or_wrong_on_another_machine_is_copied_and_nothing_else(disks: Path) -> None:
    there = disks / "soldier-1.invalid" / FOLDER
    there.mkdir(parents=True)
    (there / "config.json").write_bytes(FILES["config.json"])
    (there / "model-1.safetensors").write_bytes(b"WEIGHTS" * 9999)
    before = (there / "config.json").stat().st_mtime_ns
    told: list[str] = []
    everywhere.copy_to_all(CLUSTER, FOLDER, RECORD_OF_ALL, told.append)
    assert {name: (there / name).read_bytes() for name in FILES} == FILES
    assert (there / "config.json").stat().st_mtime_ns == before
    assert fetch_record(there) == RECORD_OF_ALL
    assert told == ["soldier-1.invalid: 2 files, 68 KiB to copy", "soldier-1.invalid: whole"]


def test_a_dry_run_copies_nothing(disks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(everywhere, "folder_there", lambda *_: (dict.fromkeys(FILES, "absent"), 1 << 40))
    told: list[str] = []
    everywhere.copy_to_all(CLUSTER, FOLDER, RECORD_OF_ALL, told.append, dry_run=True)
    assert told == ["soldier-1.invalid: 3 files, 68 KiB to copy"]
    assert not (disks / "said").exists()


def test_a_disk_that_is_too_small_is_named_before_anything_is_copied(
    disks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(everywhere, "folder_there", lambda *_: (dict.fromkeys(FILES, "absent"), 1000))
    with pytest.raises(DoesNotFitError, match=r"^soldier-1.invalid: models/small: 68 KiB are still to copy"):
        everywhere.copy_to_all(CLUSTER, FOLDER, RECORD_OF_ALL, print)
    assert not (disks / "said").exists()


def test_a_machine_that_does_not_answer_is_named_with_what_ssh_said(
    disks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (disks / "agent").write_text(
        '#!/bin/sh\necho "ssh: connect to host $1: No route to host" >&2; exit 255\n'
    )
    with pytest.raises(UnreachableError, match=r"^soldier-1.invalid: ssh: connect .* No route to host; "):
        everywhere.copy_to_all(CLUSTER, FOLDER, RECORD_OF_ALL, print)
    assert not (disks / "soldier-1.invalid" / FOLDER / RECORD).exists()
