"""One checkpoint, from shards in memory to a committed folder on every node: the protocol, run by all ranks.

1. agree     on the step and the room, disk by disk: where copies of shards do not fit, there are none; where shards
             do not, older copies and then the oldest checkpoints are given up (`retention`); where that would not do,
             this save is; leaders make `.tmp-STEP-ATTEMPT`
2. write     every rank its shard, hashing beside it, until it is on the disk
3. copy      every shard to the next node
4. manifest  the same bytes on every node, file and folder on the disk
5. rename    one rename a node to `step-NNNNNN`, parent on the disk
6. commit    when all are renamed: COMMIT by rank 0, which decides, then by the others

An OSError on any rank in 1 to 6 is a `SaveFailed` on all ranks and leaves nothing behind. From the decision on the
checkpoint counts; what goes wrong later is only told.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from uuid import uuid4

from mlx_empire import progress
from mlx_empire.checkpoint.agree import Folders, SaveFailed, agreed, in_words
from mlx_empire.checkpoint.copies import exchange_copies
from mlx_empire.checkpoint.manifest import Manifest, Shard, digest_of
from mlx_empire.checkpoint.paths import (
    COMMIT,
    LATEST,
    MANIFEST,
    draft_name,
    make_private,
    remove_checkpoint,
    shard_name,
    step_name,
)
from mlx_empire.checkpoint.retention import give_up, make_room
from mlx_empire.checkpoint.shard import LivePiece, write_shard
from mlx_empire.comm.protocol import Communicator
from mlx_empire.disk import create_private, replace_private, sync_file, sync_folder, with_headroom
from mlx_empire.sizes import amount

Describe = Callable[[Sequence[Shard]], Manifest]


@dataclass
class Commit:
    """One attempt to save `step`. `describe` makes the manifest of the shards; `copies`: whether to copy shards;
    `newest`: the step of the checkpoint before, which is never given up.
    """

    comm: Communicator
    folders: Folders
    step: int
    describe: Describe
    copies: bool | Literal["auto"]
    newest: int
    notes: list[str] = field(default_factory=list)
    renamed: bool = False
    draft: Path = Path()

    def run(self, pieces: list[LivePiece], passed: Callable[[int, int], None]) -> tuple[Shard, ...]:
        """Save the pieces of this rank; SaveFailed on all ranks, or the shards of a committed checkpoint."""
        try:
            copies = self._agree(sum(piece.nbytes for piece in pieces))
            shards = self._write(pieces, passed)
            if copies:
                with agreed(self.comm):
                    exchange_copies(self.comm, self.folders, self.draft, shards)
            digest = self._manifest(shards)
            self._rename()
            self._decide(digest)
        except SaveFailed:
            self._clean()
            raise
        self._spread(digest)
        return tuple(shards)

    def _agree(self, nbytes: int) -> bool:
        """Settle the attempt and the room for it; True if copies are made."""
        comm, folders = self.comm, self.folders
        asked = comm.gather_json([self.step, nbytes])
        assert all(step == self.step for step, _ in asked), f"ranks save different steps: {asked}"
        own, others = dict.fromkeys(folders.disks, 0), dict.fromkeys(folders.disks, 0)
        for rank, (_, size) in enumerate(asked):
            own[folders.disks[rank]] += size
            if (keeper := folders.keeper_of(rank)) is not None:
                others[folders.disks[keeper]] += size
        needed = {disk: with_headroom(nbytes) for disk, nbytes in own.items()}
        free, given_up = give_up(comm, folders, needed, self.newest)
        self.notes += given_up
        copies = bool(self.copies) and any(others.values())
        for disk, room in free.items():
            host = comm.hostnames[folders.disks.index(disk)]
            if needed[disk] > room:
                raise SaveFailed(
                    f"rank {folders.disks.index(disk)} on {host}: {amount(needed[disk])} needed, {amount(room)} free"
                )
            if copies and with_headroom(own[disk] + others[disk]) > room:
                copies = False
                self.notes.append(f"no room for copies on {host} ({amount(room)} free)")
        self.draft = folders.root / draft_name(self.step, comm.broadcast_json(uuid4().hex[:8]))
        with agreed(comm):
            if folders.leads:
                make_private(self.draft)
        return copies

    def _write(self, pieces: list[LivePiece], passed: Callable[[int, int], None]) -> list[Shard]:
        comm = self.comm
        shard = None
        with agreed(comm):
            path = self.draft / shard_name(comm.rank, comm.size)
            shard = write_shard(path, pieces, comm.rank, comm.hostname, passed)
        assert shard is not None
        return [Shard.model_validate_json(text) for text in comm.gather_json(shard.model_dump_json())]

    def _manifest(self, shards: list[Shard]) -> str:
        """Write the manifest on every node; its digest."""
        text = self.describe(shards).encode().decode() if self.comm.rank == 0 else None
        raw = self.comm.broadcast_json(text).encode()
        with agreed(self.comm):
            if self.folders.leads:
                with create_private(self.draft / MANIFEST) as file:
                    file.write(raw)
                    sync_file(file)
                sync_folder(self.draft)
        return digest_of(raw)

    def _rename(self) -> None:
        with agreed(self.comm):
            progress.reach("save-rename")
            if self.folders.leads:
                os.rename(self.draft, make_room(self.folders.root, self.step))
                self.renamed = True
                sync_folder(self.folders.root)
            progress.reach("save-renamed")

    def _decide(self, digest: str) -> None:
        with agreed(self.comm):
            progress.reach("save-commit")
        with agreed(self.comm):
            if self.comm.rank == 0:
                self._mark(digest)

    def _spread(self, digest: str) -> None:
        """COMMIT on the other nodes, and the hint for people: the checkpoint counts already."""
        problem = None
        try:
            if self.folders.leads:
                if self.comm.rank > 0:
                    self._mark(digest)
                replace_private(self.folders.root / LATEST, f"{step_name(self.step)}\n", durable=True)
        except OSError as error:
            problem = in_words(error)
        found = self.comm.gather_json(problem)
        self.notes += [f"rank {r} on {self.comm.hostnames[r]}: {p}" for r, p in enumerate(found) if p]

    def _mark(self, digest: str) -> None:
        record = {"step": self.step, "manifest": digest}
        replace_private(self.folders.root / step_name(self.step) / COMMIT, json.dumps(record), durable=True)

    def _clean(self) -> None:
        """Take back what this attempt has made; a disk that refuses even that is left as it is."""
        if self.folders.leads and self.draft != Path():
            with suppress(OSError):
                remove_checkpoint(self.folders.root / step_name(self.step) if self.renamed else self.draft)
