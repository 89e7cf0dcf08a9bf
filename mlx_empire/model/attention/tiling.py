"""Where the blocks and tiles of attention over one segment lie, and what is masked in them.

They follow from the segment's length and the window alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

QUERIES, KEYS = 128, 512  # of a tile of the vjp, where a query sees at most FINE keys
FINE = 4096
SCORES = 1 << 18  # of a block of the forward, for a head, likewise
LEAST_QUERIES, MOST_QUERIES = 32, 256  # of a block of the forward
MASKED = -1e30  # added to scores: exp() of it is 0, and it is a number in every dtype of 8 exponent bits
Keys = tuple[int, int]
Row = tuple[tuple[int, int], list[Keys]]  # a block of queries and its tiles


def coarseness(length: int, window: int) -> int:
    """How many times as long and as wide tiles are: twice where a query sees four times as many keys, so that their
    number grows with the length and not with its square.
    """
    keys, times = min(length, window or length), 1
    while keys > FINE * times**2:
        times *= 2
    return times


def blocks(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(first query, stop, first key that one of them sees) of the forward's blocks."""
    keys, times = min(length, 2 * window or length), coarseness(length, window)
    size = min(MOST_QUERIES, max(LEAST_QUERIES, SCORES * times**2 // keys))
    for a in range(0, length, size):
        yield a, min(a + size, length), max(0, a - window + 1) if window else 0


def tiles(length: int, window: int) -> Iterator[Row]:
    """The vjp's blocks of queries, each with the tiles of keys that one of them sees."""
    times = coarseness(length, window)
    queries, keys = QUERIES * times, KEYS * times
    for a in range(0, length, queries):
        b = min(a + queries, length)
        low = max(0, a - window + 1) // QUERIES * QUERIES if window else 0
        yield (a, b), [(c, min(c + keys, b)) for c in range(low, b, keys)]


def mask_of_block(a: int, b: int, low: int, window: int, per_group: int) -> mx.array:
    """What is added to the scores of the queries a to b by the keys low to b."""
    if window:
        return _edge(b - a, b - low, a - low, window, per_group)
    corner = _edge(b - a, b - a, 0, 0, per_group)
    if a == low:
        return corner
    return mx.concatenate([mx.zeros((per_group * (b - a), a - low)), corner], axis=1)


def mask_of_tile(
    queries: tuple[int, int], keys: tuple[int, int], window: int, per_group: int
) -> mx.array | None:
    """What is added to the scores of a tile; None where every query sees every key."""
    (a, b), (c, d) = queries, keys
    if a >= d - 1 and not (window and b - 1 - c >= window):
        return None
    return _edge(b - a, d - c, a - c, window, per_group)


def _edge(queries: int, keys: int, ahead: int, window: int, per_group: int) -> mx.array:
    """(per_group x queries, keys): 0 where key j is visible to query i, which lies `ahead` + i - j after it."""
    query, key = mx.arange(ahead, ahead + queries)[:, None], mx.arange(keys)[None]
    visible = query >= key
    if window:
        visible = mx.logical_and(visible, query - key < window)
    mask = mx.where(visible, 0.0, MASKED)
    return mx.broadcast_to(mask, (per_group, queries, keys)).reshape(per_group * queries, keys)
