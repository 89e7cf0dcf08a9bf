"""What of attention in blocks a plan leaves out: blocks and tiles that need what those after them need.

A graph that is played and not computed takes long where a row has thousands of tiles. Later blocks of queries see no
fewer keys and what was made before stays, so the worst moment is among the last; what is left out before them is
replaced by results of the right size. MLX hands tasks over in bundles of ten, and where a bundle begins moves a peak.
So only such numbers of blocks are left out as have a multiple of ten tasks together, and behind them at least as many
stay as it takes until all that waits is theirs. `tests/model/test_folded.py` holds figures against the whole graph's.
"""

from __future__ import annotations

PERIOD = 10  # so many alike have a multiple of ten tasks
STAY = 4  # rows of tiles, or blocks: each has dozens of tasks, and about a hundred wait at most
STAY_TILES = 6  # of a row, likewise


def blocks_left_out(count: int) -> range:
    """Of the forward's blocks; the first has no mask beside its own."""
    return _left_out(count, 1, PERIOD, STAY)


def rows_left_out(count: int, window_rows: int, alike: int) -> range:
    """Of the vjp's `count` blocks of queries. `window_rows`: those that a window reaches back, 0 without one, where
    after each `alike` of them there is a tile more: so five times as many have a multiple of ten tasks."""
    first, period = (window_rows + 1, PERIOD) if window_rows else (alike, alike * PERIOD // 2)
    return _left_out(count, first, period, STAY)


def tiles_left_out(count: int) -> range:
    """Of the tiles of one block of queries: those between the ends, which no mask cuts."""
    return _left_out(count, 2, PERIOD, STAY_TILES)


def _left_out(count: int, first: int, period: int, stay: int) -> range:
    return range(first, first + max(count - first - stay, 0) // period * period)
