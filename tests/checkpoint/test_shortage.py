"""What goes when a disk is full: copies, then the oldest checkpoints; never the newest, a pinned one, or in vain."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mlx_empire.checkpoint.agree import find_folders
from mlx_empire.checkpoint.paths import COMMIT, PIN, steps_in
from mlx_empire.checkpoint.retention import (
    Candidate,
    candidates,
    give_up,
    reclaimable_bytes,
    to_be_given_up,
)
from mlx_empire.comm.solo import SoloCommunicator

OWN, OTHER = "shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"
APART = ("king:1", "soldier:1")  # two ranks, each with a disk of its own


def step(number: int, *sizes: int) -> Candidate:
    """A checkpoint with so many bytes on the disks of rank 0, 1, ..."""
    return Candidate(number, False, {rank: {"a": n - n // 2, "b": n // 2} for rank, n in enumerate(sizes)})


def steps(chosen: list[Candidate]) -> list[int]:
    return [candidate.step for candidate in chosen]


def test_nothing_goes_while_there_is_room() -> None:
    assert to_be_given_up({"king:1": 100}, {"king:1": 100}, [step(1, 50)], APART) == []


def test_the_oldest_go_and_no_more_than_is_needed() -> None:
    order = [step(1, 40), step(2, 40), step(3, 40)]
    assert steps(to_be_given_up({"king:1": 10}, {"king:1": 50}, order, APART)) == [1]
    assert steps(to_be_given_up({"king:1": 10}, {"king:1": 51}, order, APART)) == [1, 2]
    assert steps(to_be_given_up({"king:1": 0}, {"king:1": 120}, order, APART)) == [1, 2, 3]


def test_nothing_goes_where_all_of_it_would_not_do() -> None:
    assert to_be_given_up({"king:1": 0}, {"king:1": 121}, [step(1, 60), step(2, 60)], APART) == []
    free = {"king:1": 0, "soldier:1": 0}
    assert to_be_given_up(free, {"king:1": 10, "soldier:1": 10}, [step(1, 60)], APART) == []


def test_only_what_lies_on_a_disk_that_lacks_room_goes() -> None:
    order = [step(1, 40), step(2, 0, 40), step(3, 40, 40)]
    free = {"king:1": 1000, "soldier:1": 0}
    assert steps(to_be_given_up(free, {"king:1": 10, "soldier:1": 10}, order, APART)) == [2]


def test_ranks_that_share_a_disk_give_up_together() -> None:
    one = ("king:1", "king:1")
    assert steps(to_be_given_up({"king:1": 0}, {"king:1": 80}, [step(1, 40, 40), step(2, 40, 40)], one)) == [
        1
    ]


def test_copies_go_before_checkpoints_and_the_newest_keeps_what_makes_it_whole() -> None:
    """Two nodes; step 1 and 2 have copies, but the original of one shard of step 2 is gone or cut."""
    listings = [
        {1: {OWN: 5, OTHER: 7, COMMIT: 1}, 2: {OWN: 5, OTHER: 7}, 3: {OWN: 5}},
        {1: {OWN: 5, OTHER: 7, COMMIT: 1}, 2: {OWN: 5, OTHER: 6}, 3: {OTHER: 7}},
    ]
    found = candidates(listings, (0, 1), newest=3)
    assert [str(c) for c in found] == [
        "copies of step-000001",
        "copies of step-000002",
        "step-000001",
        "step-000002",
    ]
    assert found[0].files == {0: {OTHER: 7}, 1: {OWN: 5}}
    assert found[1].files == {1: {OWN: 5}}
    assert found[2].files == {0: {OWN: 5, COMMIT: 1}, 1: {OTHER: 7, COMMIT: 1}}
    assert found[2].held("soldier:1", APART) == 8
    assert [str(c) for c in candidates(listings, (0, 1), newest=2)][-1] == "step-000001"
    with_copies = [{2: {OWN: 5, OTHER: 7}}, {2: {OWN: 5, OTHER: 7}}]
    assert [str(c) for c in candidates(with_copies, (0, 1), newest=2)] == ["copies of step-000002"]


def test_shards_of_another_number_of_ranks_are_nobodys_copies() -> None:
    listings = [{1: {OWN: 5, OTHER: 7}}, {1: {OWN: 5, OTHER: 7}}, {}]
    assert [c.copies for c in candidates(listings, (0, 1, 2), newest=2)] == [False]


@pytest.mark.parametrize(("lacks", "left"), [(0, [2, 4, 6, 8, 9]), (1, [2, 6, 8, 9]), (2, [2, 8, 9])])
def test_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: int, left: list[int]) -> None:
    """Of 2, 4, 6, 8 and 9 the second is pinned and 8 the newest; a stranger's 9 is later. The disk's room is what the
    test says; a checkpoint takes two blocks.
    """
    block = 1 << 16
    for number in (2, 4, 6, 8, 9):
        folder = tmp_path / f"step-{number:06d}"
        folder.mkdir()
        (folder / "shard-00000-of-00001.safetensors").write_bytes(bytes(2 * block))
    (tmp_path / "step-000002" / PIN).touch()
    size = 10 * block + block // 2

    def usage(place: Path) -> object:
        used = sum(path.stat().st_size for path in tmp_path.rglob("shard-*"))
        return type("usage", (), {"free": size - used})

    monkeypatch.setattr(shutil, "disk_usage", usage)
    comm = SoloCommunicator("here")
    folders = find_folders(comm, tmp_path)
    free, told = give_up(comm, folders, {folders.disks[0]: 2 * block * lacks}, newest=8)
    assert free == {folders.disks[0]: 2 * block * lacks + block // 2}
    assert told == [f"gave up step-{number:06d} for room" for number in (4, 6)[:lacks]]
    assert list(steps_in(tmp_path)) == left
    assert give_up(comm, folders, {folders.disks[0]: 100 * block}, newest=8)[1] == []
    assert list(steps_in(tmp_path)) == left


def test_what_was_set_aside_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of steps 6 and 9 that were set aside; 12 is pinned, and a folder of another name is nobody's."""
    block = 1 << 16
    kept = ("step-000002", "step-000004", "superseded-000012-00000000", "superseded-mine")
    for name in (
        *kept,
        "superseded-000006-0123abcd",
        "superseded-000009-0123abcd",
        "superseded-000009-ffffffff",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-00000-of-00001.safetensors").write_bytes(bytes(2 * block))
    (tmp_path / "superseded-000012-00000000" / PIN).touch()
    assert reclaimable_bytes(tmp_path) == 5 * 2 * block

    def usage(place: Path) -> object:
        used = sum(path.stat().st_size for path in tmp_path.rglob("shard-*"))
        return type("usage", (), {"free": 14 * block - used})

    monkeypatch.setattr(shutil, "disk_usage", usage)
    comm = SoloCommunicator("here")
    folders = find_folders(comm, tmp_path)
    disk = folders.disks[0]
    assert give_up(comm, folders, {disk: block}, newest=4)[1] == [
        "gave up what was set aside of step-000006 for room"
    ]
    assert give_up(comm, folders, {disk: 7 * block}, newest=4)[1] == [
        "gave up what was set aside of step-000009 for room",
        "gave up step-000002 for room",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({*kept} - {"step-000002"})
    assert reclaimable_bytes(tmp_path) == 2 * block
