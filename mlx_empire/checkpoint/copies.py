"""Copies of shards on another node: a machine that dies takes its disk with it.

Each rank's finished file goes to the next rank whose checkpoint folder is another one, in pieces and over the
network, and is verified there by reading it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mlx_empire import progress
from mlx_empire.checkpoint.agree import Folders
from mlx_empire.checkpoint.manifest import Shard
from mlx_empire.checkpoint.paths import open_own
from mlx_empire.checkpoint.shard import problem_with
from mlx_empire.comm.protocol import Communicator
from mlx_empire.disk import create_private, sync_file

PIECE_BYTES = 8 << 20
SIGN_OF_LIFE = 64  # pieces


def exchange_copies(comm: Communicator, folders: Folders, draft: Path, shards: list[Shard]) -> None:
    """Send this rank's shard to its keeper and keep those of others, in `draft`. Collective.

    OSError where this rank could not read or write; it has taken part in the exchange all the same.
    """
    keeper = folders.keeper_of(comm.rank)
    sources = [r for r in range(comm.size) if folders.keeper_of(r) == comm.rank]
    outgoing = _sizes(shards[comm.rank]) if keeper is not None else []
    incoming = {source: _sizes(shards[source]) for source in sources}
    own = _Disk(draft / shards[comm.rank].file, open_own)
    copies = {source: _Disk(draft / shards[source].file, create_private) for source in sources}
    for k in range(max(map(len, [outgoing, *incoming.values()]))):
        if k % SIGN_OF_LIFE == 0:
            with own.keeping():
                progress.reach("save-copy")
        sends = [(keeper, own.read(outgoing[k]))] if keeper is not None and k < len(outgoing) else []
        receives = [(s, np.empty(sizes[k], np.uint8)) for s, sizes in incoming.items() if k < len(sizes)]
        comm.transfer(sends, receives)
        for source, buffer in receives:
            copies[source].write(buffer)
    own.close()
    for source, copy in copies.items():
        copy.close(sync=True)
        if copy.problem is None and (damage := problem_with(copy.path, shards[source])):
            copy.problem = OSError(0, damage)
    for disk in (own, *copies.values()):
        if disk.problem is not None:
            raise disk.problem


class _Disk:
    """A file whose first error is kept, after which nothing happens any more: the other ranks must not wait."""

    def __init__(self, path: Path, opened: Callable[[Path], BinaryIO]) -> None:
        self.path = path
        self.problem: OSError | None = None
        self._file: BinaryIO | None = None
        with self.keeping():
            self._file = opened(path)

    def read(self, size: int) -> np.ndarray:
        buffer = np.zeros(size, np.uint8)
        with self.keeping():
            if self._file is not None and self._file.readinto(buffer.data) != size:  # type: ignore[attr-defined]
                raise OSError(0, "ended early", str(self.path))
        return buffer

    def write(self, data: np.ndarray) -> None:
        with self.keeping():
            if self._file is not None:
                self._file.write(data.data)

    def close(self, *, sync: bool = False) -> None:
        with self.keeping():
            if self._file is not None:
                if sync:
                    sync_file(self._file)
                self._file.close()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Around work with this file."""
        try:
            yield
        except OSError as error:
            self.problem = self.problem or error
            file, self._file = self._file, None
            if file is not None:
                with suppress(OSError):
                    file.close()


def _sizes(shard: Shard) -> list[int]:
    """The pieces in which a shard's file travels, in bytes."""
    return [min(PIECE_BYTES, shard.nbytes - start) for start in range(0, shard.nbytes, PIECE_BYTES)]
