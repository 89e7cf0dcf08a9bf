"""Only exact names are ours: of everything else that may lie in a checkpoint folder nothing is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_empire.checkpoint.agree import find_folders
from mlx_empire.checkpoint.paths import COMMIT, PIN, remove_checkpoint, step_name, step_of, steps_in
from mlx_empire.checkpoint.retention import clear_the_way, retain
from mlx_empire.comm.solo import SoloCommunicator

SHARD = "shard-00000-of-00001.safetensors"
COMM = SoloCommunicator("here")


def checkpoint(root: Path, step: int, *, committed: bool = True) -> Path:
    folder = root / step_name(step)
    folder.mkdir(parents=True)
    (folder / SHARD).write_text("x")
    if committed:
        (folder / COMMIT).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-000012", 12),
        ("step-1234567", 1234567),
        ("step-12", None),
        ("step-0000012", None),
        ("step-000012 ", None),
        ("step-000012.old", None),
        ("Step-000012", None),
        ("../step-000012", None),
        ("step-٠٠٠٠١٢", None),
    ],
)
def test_only_exact_names_are_checkpoints(name: str, step: int | None) -> None:
    assert step_of(name) == step


def test_the_newest_and_the_pinned_stay(tmp_path: Path) -> None:
    for step in range(1, 8):
        checkpoint(tmp_path, step)
    (tmp_path / step_name(2) / PIN).touch()
    folders = find_folders(COMM, tmp_path)
    retain(COMM, folders, 7, None)
    assert list(steps_in(tmp_path)) == list(range(1, 8))
    retain(COMM, folders, 7, 3)
    assert list(steps_in(tmp_path)) == [2, 5, 6, 7]
    retain(COMM, folders, 7, 1)
    assert list(steps_in(tmp_path)) == [2, 7]


def test_what_was_just_committed_stays_in_any_case(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        checkpoint(tmp_path, step)
    retain(COMM, find_folders(COMM, tmp_path), 3, 1)  # a clock or a person may have made later ones
    assert list(steps_in(tmp_path)) == [3, 9]


def test_links_and_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    checkpoint(outside, 1)
    root = tmp_path / "root"
    for step in (2, 4):
        checkpoint(root, step)
    (root / step_name(1)).symlink_to(outside / step_name(1))
    (root / step_name(2) / "notes.txt").write_text("mine")
    (root / step_name(2) / "MANIFEST.json").symlink_to(outside / step_name(1) / SHARD)
    (root / step_name(3)).write_text("a file")
    with pytest.raises(Exception, match="not empty"):
        retain(COMM, find_folders(COMM, root), 4, 1)
    assert (outside / step_name(1) / SHARD).read_text() == "x"
    assert {p.name for p in (root / step_name(2)).iterdir()} == {"notes.txt"}
    assert (root / step_name(3)).read_text() == "a file"
    assert (root / step_name(1)).is_symlink()


def test_commit_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever moment a removal is interrupted at, what is left does not count as a checkpoint."""
    folder = checkpoint(tmp_path, 1)
    removed: list[str] = []
    unlink = Path.unlink

    def noted(path: Path, missing_ok: bool = False) -> None:
        removed.append(path.name)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", noted)
    remove_checkpoint(folder)
    assert removed == [COMMIT, SHARD]


def test_a_start_clears_what_was_interrupted_and_sets_later_ones_aside(tmp_path: Path) -> None:
    checkpoint(tmp_path, 3)
    checkpoint(tmp_path, 6, committed=False)
    checkpoint(tmp_path, 9)
    draft = tmp_path / ".tmp-12-0123abcd"
    draft.mkdir()
    (draft / SHARD).touch()
    (tmp_path / ".tmp-12-xyz").mkdir()
    (told,) = clear_the_way(COMM, find_folders(COMM, tmp_path), 3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[:2] == [".tmp-12-xyz", "step-000003"]
    assert len(names) == 3
    assert names[2].startswith("superseded-000009-")
    assert told == f"{names[2]}: set aside, for the run goes on from step 3"
    assert (tmp_path / names[2] / COMMIT).exists()
