"""How many bytes each collective moves from each rank to each other one, and which way a gather takes.

These are the plan's counts: the time model prices them, `comm/` must reproduce them exactly. They cover
payload only (no headers, no control messages). `edges` are the N + 1 borders, in elements, of the intervals
that N ranks own in one flat buffer: rank r owns [edges[r], edges[r + 1]), possibly nothing. A matrix is
indexed [source][destination].

The launcher asks here which messages Open MPI's TCP sends without asking the receiver first; that needs no MPI.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from mlx_empire.errors import UserError

Route = Literal["auto", "direct", "relay"]
Matrix = list[list[int]]

# The largest message; of a reduction two are in flight between two ranks. On one machine 4 MiB was as fast as anything
# larger (shared memory: 13 GB/s each way, loopback TCP: 2 GB/s) and 1 MiB was slower over TCP.
DEFAULT_BUCKET_BYTES = 4 << 20
# Between machines buckets travel in pieces that TCP takes without a handshake (`comm.exchange` tells why); so many more
# of them are in flight. Smaller ones cost more of a core: 64 KiB twice as much as these at 10 Gbit/s.
PIECE_BYTES = 256 << 10
# Elements that are added at once: total and converted values (256 KiB each) stay in the second-level cache.
ADDED_AT_ONCE = 1 << 16


def interval_sizes(edges: Sequence[int]) -> list[int]:
    """Number of elements that each rank owns. Raises ValueError for edges that do not start at 0 or that
    fall."""
    sizes = [high - low for low, high in pairwise(edges)]
    if len(edges) < 2 or edges[0] != 0 or min(sizes) < 0:
        raise ValueError(f"edges must start at 0 and never fall, got {list(edges)}")
    return sizes


def resolve_route(route: Route, edges: Sequence[int]) -> Literal["direct", "relay"]:
    """The way a gather of these intervals takes: `auto` relays when they are unequal and more than two
    ranks share.

    Sent directly, the owner of a fraction f sends f x (N - 1) of the whole over its own card, which for a
    big owner is more than once the whole; relayed in ring order no card sends or receives more than the
    whole.
    """
    if route != "auto":
        return route
    sizes = interval_sizes(edges)
    return "relay" if len(sizes) > 2 and min(sizes) != max(sizes) else "direct"


def all_gather_bytes(edges: Sequence[int], itemsize: int, route: Route = "auto") -> Matrix:
    """Bytes of one all-gather, after which every rank holds the whole buffer.

    direct: each rank sends its own interval to every other one.
    relay: each rank sends to the next one (rank + 1 modulo N) everything but what the next one owns.
    """
    sizes = interval_sizes(edges)
    ranks = range(len(sizes))
    if resolve_route(route, edges) == "direct":
        return [[0 if source == to else sizes[source] * itemsize for to in ranks] for source in ranks]
    sent = _zeros(len(sizes))
    if len(sizes) > 1:
        for source in ranks:
            to = (source + 1) % len(sizes)
            sent[source][to] = (edges[-1] - sizes[to]) * itemsize
    return sent


def reduce_scatter_bytes(edges: Sequence[int], itemsize: int, contributes: Sequence[bool]) -> Matrix:
    """Bytes of one reduce-scatter: each contributing rank sends every other rank the interval that it owns.

    itemsize: bytes per element on the wire (2 for bfloat16), not of the fp32 total.
    """
    sizes = interval_sizes(edges)
    ranks = range(len(sizes))
    return [
        [sizes[to] * itemsize if contributes[source] and source != to else 0 for to in ranks]
        for source in ranks
    ]


def scatter_bytes(edges: Sequence[int], itemsize: int, root: int) -> Matrix:
    """Bytes of one scatter: root sends every other rank the interval that it owns."""
    sizes = interval_sizes(edges)
    sent = _zeros(len(sizes))
    sent[root] = [0 if to == root else size * itemsize for to, size in enumerate(sizes)]
    return sent


def card_bytes(sent: Matrix) -> list[tuple[int, int]]:
    """(bytes sent, bytes received) of each rank: what its one network card carries."""
    return [(sum(row), sum(column)) for row, column in zip(sent, zip(*sent, strict=True), strict=True)]


def staging_bytes(edges: Sequence[int], itemsize: int, rank: int, bucket_bytes: int) -> int:
    """Upper bound, in bytes, of the buffers that `rank` needs beside its data for a reduce-scatter.

    Two buckets of its own interval from every peer, two buckets packed for every peer, in however many messages they
    travel; a gather needs none.
    """
    sizes = interval_sizes(edges)
    largest = max(itemsize, bucket_bytes // itemsize * itemsize)
    held = [min(size * itemsize, 2 * largest) for size in sizes]
    return (len(sizes) - 1) * held[rank] + sum(held) - held[rank]


def _zeros(size: int) -> Matrix:
    return [[0] * size for _ in range(size)]


EAGER_LIMIT = "btl_tcp_eager_limit"  # Open MPI's name for it; with the header
DEFAULT_EAGER_LIMIT = 65536
UNASKED_FACT = "unasked bytes"
HEADER_BYTES = 1024  # more than what Open MPI adds to a message


def unasked_bytes(environment: Mapping[str, str]) -> int:
    """The largest message that is sent unasked by a rank with this environment, in which mpirun puts its settings."""
    said = environment.get(f"OMPI_MCA_{EAGER_LIMIT}", "").strip().lower()
    number, scale = said.rstrip("kmgb"), {"k": 10, "m": 20, "g": 30}.get(said.rstrip("b")[-1:], 0)
    limit = int(number) << scale if number.isascii() and number.isdigit() else DEFAULT_EAGER_LIMIT
    return max(limit - HEADER_BYTES, HEADER_BYTES)


def agreed_unasked_bytes(answers: Sequence[Mapping[str, Any]]) -> int:
    """The largest message that no rank's MPI asks about, by what each rank said under `UNASKED_FACT`.

    A rank of version 0.1, which knows no such message, says what it runs instead: UserError.
    """
    if any(set(answer) != {UNASKED_FACT} for answer in answers):
        raise UserError(
            "the ranks run different versions of mlx_empire; install the same version on every machine"
        )
    return min(int(answer[UNASKED_FACT]) for answer in answers)


def eager_words() -> list[str]:
    """Words of the mpirun line with which a piece is sent unasked. The second limit may not be below the first."""
    size = str(PIECE_BYTES + HEADER_BYTES)
    return ["--mca", EAGER_LIMIT, size, "--mca", "btl_tcp_max_send_size", size]
