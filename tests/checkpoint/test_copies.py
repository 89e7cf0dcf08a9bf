"""Copies of another machine's shard, apart from any run: what the keeper's disk holds is read back and compared."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_empire.checkpoint import copies
from mlx_empire.checkpoint.agree import Folders
from mlx_empire.checkpoint.manifest import Shard
from mlx_empire.checkpoint.paths import shard_name
from mlx_empire.checkpoint.shard import LivePiece, write_shard

RANKS = (0, 1)


class Wire:
    """Two ranks as threads; `transfer` is all that copies ask of a communicator."""

    def __init__(self, rank: int, queues: dict[tuple[int, int], queue.Queue[np.ndarray]]) -> None:
        self.rank, self.size, self._queues = rank, len(RANKS), queues

    def transfer(
        self, sends: Sequence[tuple[int, np.ndarray]], receives: Sequence[tuple[int, np.ndarray]]
    ) -> None:
        for to, data in sends:
            self._queues[self.rank, to].put(data.copy())
        for source, buffer in receives:
            buffer[:] = self._queues[source, self.rank].get(timeout=30)


class Lying:
    """A disk that takes all that it is given and keeps one bit of it otherwise."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        altered = bytearray(data)
        altered[-1] ^= 1
        return int(self._file.write(altered))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    """A shard of each rank in a folder of its own."""
    found = []
    for rank in RANKS:
        (tmp_path / f"{rank}").mkdir()
        rows = np.arange(128, dtype=np.float32) + rank
        piece = LivePiece(0, "w", "weights", "F32", 2 * rank, 64, 2, [rows.view(np.uint8)])
        path = tmp_path / f"{rank}" / shard_name(rank, len(RANKS))
        found.append(write_shard(path, [piece], rank, f"host{rank}", lambda unit, nbytes: None))
    return found


def exchanged(tmp_path: Path, shards: list[Shard]) -> list[str | None]:
    """By rank what is said of its disk."""
    queues: dict[tuple[int, int], queue.Queue[np.ndarray]] = {
        (a, b): queue.Queue() for a in RANKS for b in RANKS
    }

    def exchange(rank: int) -> str | None:
        folders = Folders(tmp_path / f"{rank}", rank, RANKS, ("a", "b"))
        wire: Any = Wire(rank, queues)
        try:
            copies.exchange_copies(wire, folders, tmp_path / f"{rank}", shards)
        except OSError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(RANKS)) as pool:
        return list(pool.map(exchange, RANKS))


def test_each_folder_holds_the_other_shard_too(tmp_path: Path, shards: list[Shard]) -> None:
    assert exchanged(tmp_path, shards) == [None, None]
    for shard in shards:
        own, copy = (tmp_path / f"{rank}" / shard.file for rank in RANKS)
        assert own.read_bytes() == copy.read_bytes()


def test_a_copy_that_lies_on_the_disk_otherwise_is_an_error_of_its_keeper(
    tmp_path: Path, shards: list[Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = copies.create_private
    liar = tmp_path / "1"
    monkeypatch.setattr(
        copies, "create_private", lambda path: Lying(real(path)) if path.parent == liar else real(path)
    )
    fine, damaged = exchanged(tmp_path, shards)
    assert fine is None
    assert damaged is not None
    assert shards[0].file in damaged
