"""The speed of every pair of machines, measured by MPI: a rank on each, started by `links`.

Pairs are measured in rounds of disjoint pairs, both directions at once, as a step uses them: a wire that cannot do both
(Wi-Fi) shows up as half of what it says. The lower rank of a pair decides how much comes next; a pair takes about
`SECONDS` where it is slow, and never much more than twice that. Rank 0 prints the result as one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from mlx_empire.comm.connect import connect
from mlx_empire.comm.failure import guard
from mlx_empire.comm.protocol import Communicator

SECONDS = 1.4
FIRST_BYTES, LARGEST_BYTES = 1 << 18, 256 << 20
MARK = "links:"
Pair = tuple[int, int]


def rounds(size: int) -> list[list[Pair]]:
    """Every pair of ranks once, in rounds in which no rank stands twice (the circle method of tournaments)."""
    places: list[int | None] = [*range(size), *([None] if size % 2 else [])]
    found = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return [one for one in found if one]


def measure(comm: Communicator, peer: int) -> float:
    """Bytes per second in each direction between this rank and `peer`, which calls this too: of the best exchange."""
    decides = comm.rank < peer
    word = np.array([FIRST_BYTES], np.int64)
    out, into = np.zeros(FIRST_BYTES, np.uint8), np.empty(FIRST_BYTES, np.uint8)
    best, total = 0.0, 0.0
    while True:
        if decides:
            comm.transfer([(peer, word)], [])
        else:
            comm.transfer([], [(peer, word)])
        nbytes = int(word[0])
        if nbytes == 0:
            return best
        if nbytes > out.size:
            out, into = np.zeros(nbytes, np.uint8), np.empty(nbytes, np.uint8)
            into[:] = 1  # its pages are there before the clock runs
        start = time.perf_counter()
        comm.transfer([(peer, out[:nbytes])], [(peer, into[:nbytes])])
        seconds = time.perf_counter() - start
        total += seconds
        rate = nbytes / seconds
        best = max(best, rate) if seconds >= SECONDS / 8 else rate  # a short one says little
        if decides:
            wanted = int(nbytes * min(16.0, max(1.0, (SECONDS - total) / seconds)))
            word[0] = 0 if total >= SECONDS / 2 else min(LARGEST_BYTES, wanted)


def measure_all(comm: Communicator) -> dict[Pair, float]:
    """Bytes per second of every pair of ranks, the lesser of what its two ends saw. Collective."""
    found: dict[Pair, float] = {}
    for pairs in rounds(comm.size):
        own = next((pair for pair in pairs if comm.rank in pair), None)
        rate = None if own is None else measure(comm, own[0] + own[1] - comm.rank)
        seen = comm.gather_json(rate)  # nobody begins the next round before all have ended this one
        found |= {pair: min(seen[pair[0]], seen[pair[1]]) for pair in pairs}
    return found


def main() -> int:
    """A rank's work."""
    with guard(None):
        comm = connect(deadline_seconds=60.0)
    with guard(comm):
        found = measure_all(comm)
        if comm.rank == 0:
            print(MARK, json.dumps([[a, b, rate] for (a, b), rate in found.items()]), flush=True)
        return 0
    raise AssertionError("guard does not return from an error")


if __name__ == "__main__":
    sys.exit(main())
