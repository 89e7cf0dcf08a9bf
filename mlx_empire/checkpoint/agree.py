"""How the ranks agree while they save: an error of one disk is an error of the save, never of the run.

Before a save they also find out whether what several of them hold whole is the same, down to the last bit. At stages
0 to 2 every rank has all weights, at stage 0 also all optimizer states. They are computed or gathered alike, so a
difference means a machine whose memory, network or software is at fault. Compared by CRC-32 for each tensor: it finds
accidents, not forgeries, at several GB/s.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import mlx.core as mx

from mlx_empire import progress
from mlx_empire.comm.buffers import host_view
from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.disk import create_private, disk_of, mount_point
from mlx_empire.engine.store import ShardStore
from mlx_empire.errors import NumericsError, UserError, on_all_ranks
from mlx_empire.plan.disk import keeper_of


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

    `disks`: by rank, what identifies the file system of its folder (`disk.disk_of`); on a disk that several machines
    see, what identifies it for the lowest rank.
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
        """The rank that keeps a copy of this rank's shard; None where there is none."""
        return keeper_of(rank, self.leaders)


def find_folders(comm: Communicator, root: Path) -> Folders:
    """Make this rank's folder and find out by probe files who shares it, or its disk. Collective; UserError agreed on.

    A disk on a network is found by the path of another's folder, as it is there or below the disk's own mount point.
    """
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
    mount, real = mount_point(root), root.resolve()
    told = comm.gather_json([str(real), str(real.relative_to(mount)), disk_of(root, comm.hostname)])
    in_root = [os.path.exists(root / name) for name in names]
    on_disk = [
        found or any(_is_beside(root, way / name) for way in (Path(path), mount / below))
        for found, name, (path, below, _) in zip(in_root, names, told, strict=True)
    ]
    answers = comm.gather_json([in_root.index(True), on_disk.index(True)])
    own.unlink(missing_ok=True)
    disks: list[str] = []
    for rank, (_, first) in enumerate(answers):
        disks.append(told[rank][2] if first == rank else disks[first])
    return Folders(root, comm.rank, tuple(leader for leader, _ in answers), tuple(disks))


def _is_beside(root: Path, probe: Path) -> bool:
    """Whether `probe` is there, on the file system of `root`."""
    try:
        return os.stat(probe).st_dev == os.stat(root).st_dev
    except OSError:
        return False


def replicas_agree(store: ShardStore, comm: Communicator) -> None:
    """NumericsError on all ranks naming tensor and ranks unless all replicas are equal. Collective, control plane.

    To be called between steps, when no unit is on its way.
    """
    if comm.size == 1 or not store.keeps_whole:
        return
    own = dict(_digests(store))
    everything = zlib.crc32(repr(own).encode())
    if len(set(comm.gather_json(everything))) == 1:
        return
    by_rank = comm.gather_json(own)
    for name in own:
        values = [digests[name] for digests in by_rank]
        common = max(values, key=values.count)
        odd = [rank for rank, value in enumerate(values) if value != common]
        if odd:
            two = comm.size == 2
            ranks = range(2) if two else odd
            who = " and ".join(f"rank {rank} on {comm.hostnames[rank]}" for rank in ranks)
            differs = (
                "differ" if two else "differ from all others" if len(odd) > 1 else "differs from all others"
            )
            raise on_all_ranks(
                NumericsError(
                    f"{who} {differs} in {name}, which must be equal on all ranks; the memory or the network of a "
                    "machine is at fault; continue from the last checkpoint"
                )
            )


def _digests(store: ShardStore) -> Iterator[tuple[str, int]]:
    """(tensor or tensor/state, CRC-32) of everything that is held whole."""
    for unit in store.plan.units:
        for s, segment in enumerate(unit.segments):
            progress.advance()
            digests: dict[str, int] = {}
            chunks = iter(store.chunks[unit.index][s])
            if store.plan.zero_stage == 0:
                for chunk in chunks:
                    for key, array in sorted({"": chunk.weights, **chunk.state}.items()):
                        name = f"{chunk.spec.name}/{key}" if key else chunk.spec.name
                        digests[name] = _crc(array, digests.get(name, 0))
            else:
                whole = store.whole(unit.index)[s]
                for placement in segment.placements:
                    a = placement.start // 64
                    rows = whole[a : a + placement.tensor.padded_size // 64]
                    digests[placement.tensor.name] = _crc(rows, 0)
            yield from digests.items()


def _crc(array: mx.array, start: int) -> int:
    return zlib.crc32(host_view(mx.contiguous(array)).data, start)
