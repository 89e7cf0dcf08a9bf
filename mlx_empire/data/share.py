"""Data for every rank: read on each node where it is there, else read by rank 0 and sent.

All ranks must train on the same tokens: digests are compared, and ranks whose data differ are named.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.data.rows import Dataset, Table
from mlx_empire.data.splits import Splits
from mlx_empire.errors import UserError, on_all_ranks


def shared_splits(comm: Communicator, load: Callable[[], Splits], available: bool) -> Splits:
    """The splits on every rank; `available`: whether this node has data and tokenizer. Collective."""
    everywhere = all(comm.gather_json(available))
    splits: Splits | None = None
    with together(comm):
        if everywhere or comm.rank == 0:
            splits = load()
    if not everywhere:
        return _sent(comm, splits)
    assert splits is not None
    digests = comm.gather_json(splits.digest)
    if len(set(digests)) > 1:
        odd = [comm.hostnames[r] for r, digest in enumerate(digests) if digest != digests[0]]
        raise on_all_ranks(
            UserError(
                f"data.path: {', '.join(odd)} and {comm.hostnames[0]} have different data; copy it anew"
            )
        )
    return splits


def _sent(comm: Communicator, splits: Splits | None) -> Splits:
    """Rank 0's splits on every rank."""
    about = comm.broadcast_json(
        None
        if splits is None
        else {
            "length": splits.train.sequence_length,
            "packed": splits.train.packed,
            "valid": splits.valid is not None,
            "report": [*splits.report, "data read by rank 0 and sent to the other ranks"],
            "digest": splits.digest,
        }
    )
    train = _dataset(comm, splits.train if splits else None, about["length"], about["packed"])
    valid = None
    if about["valid"]:
        valid = _dataset(comm, splits.valid if splits else None, about["length"], about["packed"])
    return Splits(train, valid, about["report"], about["digest"])


def _dataset(comm: Communicator, own: Dataset | None, length: int, packed: bool) -> Dataset:
    kinds = {"tokens": np.int32, "counted": np.uint8, "pieces": np.int64, "rows": np.int64}
    arrays = {}
    for name, dtype in kinds.items():
        values = np.array(getattr(own.table, name)) if own is not None else np.empty(0, dtype)
        arrays[name] = comm.gather_arrays(values)[0]
    return Dataset(Table(**arrays), length, packed)
