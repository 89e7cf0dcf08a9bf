"""How the ranks agree while they save: an error of one disk is an error of the save, never of the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.disk import create_private, disk_of
from mlx_empire.errors import UserError


class SaveFailed(Exception):
    """A checkpoint could not be written; what was there before is as it was. Known to all ranks."""


@contextmanager
def agreed(comm: Communicator) -> Iterator[None]:
    """Around a rank's own work with the disk: SaveFailed on all ranks if any of them had an OSError. Collective."""
    problem = None
    try:
        yield
    except OSError as error:
        problem = in_words(error)
    problems = comm.gather_json(problem)
    found = [f"rank {r} on {comm.hostnames[r]}: {p}" for r, p in enumerate(problems) if p is not None]
    if found:
        raise SaveFailed("; ".join(found))


def in_words(error: OSError) -> str:
    """What the system said, and about which file."""
    text = error.strerror or str(error)
    return f"{text} ({error.filename})" if error.filename else text


@dataclass(frozen=True)
class Folders:
    """Where this rank keeps checkpoints, and which ranks share a folder: the lowest of them, by rank, leads it.

    `disks`: by rank, what identifies the file system of its folder (`disk.disk_of`).
    """

    root: Path
    rank: int
    leaders: tuple[int, ...]
    disks: tuple[str, ...]

    @property
    def leads(self) -> bool:
        """True for the one rank that makes and renames directories in this folder."""
        return self.leaders[self.rank] == self.rank

    def keeper_of(self, rank: int) -> int | None:
        """The next rank with another folder, which keeps a copy of this rank's shard; None where there is none."""
        size = len(self.leaders)
        following = ((rank + k) % size for k in range(1, size))
        return next((r for r in following if self.leaders[r] != self.leaders[rank]), None)


def find_folders(comm: Communicator, root: Path) -> Folders:
    """Make this rank's folder and find out by probe files who shares it. Collective; UserError agreed on."""
    nonce = comm.broadcast_json(uuid4().hex[:8])
    names = [f".probe-{nonce}-{rank}" for rank in range(comm.size)]
    own = root / names[comm.rank]
    with together(comm):
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            create_private(own).close()
        except OSError as error:
            raise UserError(
                f"run.checkpoints: {root}: {error.strerror}; choose a folder that can be written"
            ) from None
    seen = [rank for rank, name in enumerate(names) if (root / name).exists()]
    answers = comm.gather_json([min(seen), disk_of(root, comm.hostname)])
    own.unlink(missing_ok=True)
    leaders = tuple(leader for leader, _ in answers)
    return Folders(root, comm.rank, leaders, tuple(answers[leader][1] for leader in leaders))
