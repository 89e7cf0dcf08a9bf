"""What looking for findings takes of memory is what docs/inspect.md says."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mlx_empire.inspect.findings import SplitRows, find
from mlx_empire.inspect.walk import COLUMNS, ROW, Reading, SeenRows

COUNT = 200_000


def made_up(count: int) -> SeenRows:
    """Rows of which every second one says what another says, and a tenth is cut or not learnt."""
    random = np.random.default_rng(7)
    rows = np.zeros(count, list(COLUMNS.items()))
    for name in ("exact", "words", "prompt", "reply"):
        rows[name] = random.integers(1, 2**63, count) if name == "exact" else random.integers(1, count, count)
    rows["line"] = np.arange(1, count + 1)
    rows["tokens"], rows["kept"], rows["learnt"] = (
        100,
        random.integers(90, 101, count),
        random.integers(0, 11, count),
    )
    nothing = np.empty(0, np.int32)
    return SeenRows(
        rows, np.empty(0, np.uint32), ["train.jsonl"], [], 0, nothing, None, Counter(), [], [], []
    )


@pytest.mark.parametrize(("held_out", "times"), [(False, 1), (True, 2)])
def test_rows_are_compared_in_as_much_memory_again_and_twice_as_much_where_some_are_held_out(
    held_out: bool, times: int
) -> None:
    seen = made_up(COUNT)
    assert seen.rows.nbytes == ROW.size * COUNT == 64 * COUNT
    mask = np.arange(COUNT) % 10 == 0 if held_out else np.zeros(COUNT, bool)
    parts = [SplitRows("train", seen, np.flatnonzero(~mask))]
    parts += [SplitRows("valid", seen, np.flatnonzero(mask))] if held_out else []
    reading = Reading(Path("train.jsonl"), "tokens", 64, False, True, 0.0, None, None)
    tracemalloc.start()
    try:
        names = [one.name for one in find(reading, parts)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert {"dropped_train", "cut_train", "duplicates_words", "contradictions"} <= set(names)
    assert ("leakage_words" in names) == held_out
    assert peak < times * seen.rows.nbytes
