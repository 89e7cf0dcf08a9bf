"""Decides in which order examples are read: a pure function of seed and step, blind to the number of ranks.

Epoch e is a permutation of the rows; position p = step * global_size + k reads row p mod n of epoch p div n.
So any step can be computed alone, and a run resumes anywhere on any number of machines.
"""

from functools import lru_cache

import numpy as np

FIXED_SEED = 0x656D70697265  # for shuffles that belong to the data and must not follow run.seed


@lru_cache(maxsize=4)
def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation (rows,) int64 of an epoch, from Philox-4x64-10 keyed with (seed, epoch).

    Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.

    The raw 64-bit stream is sorted rather than handed to `Generator.permutation`: numpy promises that raw
    streams stay the same from version to version, but not what its Generator makes of them (NEP 19).
    """
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(rows), kind="stable")
    order.setflags(write=False)
    return order


def fixed_permutation(count: int) -> np.ndarray:
    """A permutation (count,) int64 that is the same in every run, whatever its seed."""
    return epoch_order(count, FIXED_SEED, 0)


def rows_at(rows: int, seed: int, first: int, count: int) -> np.ndarray:
    """The row indices (count,) int64 at positions first, first + 1, ... of the endless sequence of epochs."""
    positions = np.arange(first, first + count)
    epochs, places = positions // rows, positions % rows
    return np.concatenate(
        [epoch_order(rows, seed, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
    )
