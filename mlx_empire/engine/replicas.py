"""Whether what several ranks hold whole is the same on all of them, down to the last bit.

At stages 0 to 2 every rank has all weights, at stage 0 also all optimizer states. They are computed or gathered alike,
so a difference means a machine whose memory, network or software is at fault. Compared by CRC-32 for each tensor: it
finds accidents, not forgeries, at several GB/s.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import mlx.core as mx

from mlx_empire import progress
from mlx_empire.comm.buffers import host_view
from mlx_empire.comm.protocol import Communicator
from mlx_empire.engine.store import ShardStore
from mlx_empire.errors import NumericsError, on_all_ranks


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
