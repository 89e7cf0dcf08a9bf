"""Which checkpoint is chosen and who reads what, on made-up folders: moved, linked to, damaged, shared or not."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.manifests import manifest_of

from mlx_empire.checkpoint.find import CheckpointSearch, FoundCheckpoint
from mlx_empire.checkpoint.manifest import Manifest, Shard
from mlx_empire.checkpoint.paths import shard_name, step_name
from mlx_empire.checkpoint.shard import LivePiece, write_shard
from mlx_empire.errors import DamagedError, EmpireError

STEPS = (3, 6)


class _Ranks:
    """Ranks as threads: `gather_json` is all that a survey asks of a communicator."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hostnames = list(hosts)
        self._values: list[Any] = [None] * len(hosts)
        self._barrier = threading.Barrier(len(hosts), timeout=30)

    def survey(self, roots: Sequence[Path]) -> list[FoundCheckpoint | EmpireError | None]:
        """What each rank finds in its folder."""
        with ThreadPoolExecutor(len(roots)) as pool:
            return list(pool.map(self._newest, range(len(roots)), roots))

    def _newest(self, rank: int, root: Path) -> FoundCheckpoint | EmpireError | None:
        try:
            return CheckpointSearch(_Rank(self, rank), root).newest()  # type: ignore[arg-type]
        except EmpireError as error:
            return error

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = json.dumps(value)
        self._barrier.wait()
        found = [json.loads(one) for one in self._values]
        self._barrier.wait()
        return found


class _Rank:
    def __init__(self, ranks: _Ranks, rank: int) -> None:
        self.rank, self.size, self.hostnames = rank, len(ranks.hostnames), ranks.hostnames
        self.hostname = ranks.hostnames[rank]
        self._ranks = ranks

    def gather_json(self, value: Any) -> list[Any]:
        return self._ranks.gather(self.rank, value)


def written(roots: Sequence[Path], hosts: Sequence[str]) -> None:
    """Checkpoints of STEPS, one rank's shard in each of `roots` (which may be the same), as a run leaves them."""
    for step in STEPS:
        shards = []
        for rank, (root, host) in enumerate(zip(roots, hosts, strict=True)):
            folder = root / step_name(step)
            folder.mkdir(parents=True, exist_ok=True)
            rows = np.full((2, 64), step + rank, np.float32)
            piece = LivePiece(0, "w", "weights", "F32", 2 * rank, 64, 2, [rows.reshape(-1).view(np.uint8)])
            path = folder / shard_name(rank, len(roots))
            shards.append(write_shard(path, [piece], rank, host, lambda unit, nbytes: None))
        raw = manifest(step, shards).encode()
        commit = json.dumps({"step": step, "manifest": hashlib.sha256(raw).hexdigest()})
        for root in set(roots):
            (root / step_name(step) / "MANIFEST.json").write_bytes(raw)
            (root / step_name(step) / "COMMIT").write_text(commit)


def manifest(step: int, shards: Sequence[Shard]) -> Manifest:
    return manifest_of(
        step=step, zero_stage=2, shares=tuple(1 / len(shards) for _ in shards), shards=tuple(shards)
    )


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))


MOVES: dict[str, Callable[[Path, Path], object]] = {
    "in place": lambda old, new: None,
    "moved": lambda old, new: shutil.move(old, new),
    "copied": lambda old, new: shutil.copytree(old, new),
    "linked to": lambda old, new: new.symlink_to(old),
}


@pytest.mark.parametrize("host", ["king", "renamed"])
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_checkpoint_is_whole_wherever_it_lies(
    tmp_path: Path, ranks: int, together: bool, move: str, host: str
) -> None:
    old, new = tmp_path / "old", tmp_path / ("old" if move == "in place" else "new")
    places = [Path("all") if together else Path(f"node-{rank}") for rank in range(ranks)]
    written([old / place for place in places], ["king"] * ranks)
    MOVES[move](old, new)
    for found in _Ranks([host] * ranks).survey([new / place for place in places]):
        assert isinstance(found, FoundCheckpoint), found
        assert found.step == 6
        assert all(place == reader or together for place, reader in enumerate(found.readers))
        if (move, host) == ("in place", "king"):
            assert found.notes == ()
            continue
        assert all(shard_name(rank, ranks) in "".join(found.notes) for rank in range(ranks))
        assert len(found.notes) == len(set(places)), "one line for each place"
        assert f"{old / places[0] / 'step-000006'} on king" in found.notes[0]
        assert f"{new / places[0] / 'step-000006'} on {host}" in found.notes[0]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_damaged_shard_of_a_moved_folder_is_named_and_the_step_before_taken(
    tmp_path: Path, ranks: int, together: bool
) -> None:
    places = [Path("all") if together else Path(f"node-{rank}") for rank in range(ranks)]
    written([tmp_path / "old" / place for place in places], ["king"] * ranks)
    shutil.move(tmp_path / "old", tmp_path / "new")
    bad = tmp_path / "new" / places[-1] / "step-000006" / shard_name(ranks - 1, ranks)
    damage(bad)
    for found in _Ranks(["king"] * ranks).survey([tmp_path / "new" / place for place in places]):
        assert isinstance(found, FoundCheckpoint), found
        assert found.step == 3
        assert found.notes[0].startswith(f"WARNING: step-000006 is damaged: {bad}: tensor w/weights: digest ")


def test_a_copy_in_a_moved_folder_stands_in_for_a_damaged_shard(tmp_path: Path) -> None:
    """Four ranks, two to a folder: the copy is read by one of the two who have it."""
    places = [tmp_path / "old" / name for name in ("one", "one", "two", "two")]
    written(places, ["king"] * 4)
    shard = Path("step-000006") / shard_name(0, 4)
    shutil.copy(places[0] / shard, places[2] / shard)
    shutil.move(tmp_path / "old", tmp_path / "new")
    damage(tmp_path / "new" / "one" / shard)
    for found in _Ranks(["king"] * 4).survey([tmp_path / "new" / place.name for place in places]):
        assert isinstance(found, FoundCheckpoint), found
        assert found.step == 6
        assert found.readers[0] in (2, 3)
        assert "its copy on another node is used" in found.notes[0]
        assert f"{shard_name(0, 4)}, written to " in "".join(found.notes[1:])


def test_a_checkpoint_behind_a_link_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    root = tmp_path / "run"
    written([root], ["king"])
    shutil.move(root / "step-000006", tmp_path / "aside")
    (root / "step-000006").symlink_to(tmp_path / "aside")
    (found,) = _Ranks(["king"]).survey([root])
    assert isinstance(found, FoundCheckpoint)
    assert found.step == 3
    assert "step-000006 on king is a symbolic link, which is not followed" in found.notes[0]
    shutil.rmtree(root / "step-000003")
    (refused,) = _Ranks(["king"]).survey([root])
    assert isinstance(refused, DamagedError)
    assert "step-000006 on king is a symbolic link, which is not followed" in str(refused)
