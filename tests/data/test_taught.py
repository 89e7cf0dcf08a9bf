"""A teacher's values on the disk: two runs that ask the same at once, and an entry that is damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlx_empire.data.rows import Dataset, Table
from mlx_empire.data.taught import TaughtEntry, load_values, writing

TOP = 3
# Two rows of three and two tokens, of which the second and third, and the last, are targets.
ROWS = Dataset(
    Table(
        np.arange(5, dtype=np.int32),
        np.array([0, 1, 1, 0, 1], np.uint8),
        np.array([0, 3, 5]),
        np.array([0, 1, 2]),
    ),
    8,
    packed=False,
)


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaughtEntry:
    monkeypatch.setenv("MLX_EMPIRE_CACHE", str(tmp_path))
    return TaughtEntry.of(ROWS, "rows", "teacher", TOP, 1.0, "auto")


def values(first: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.arange(first, first + 3 * TOP, dtype=np.int32).reshape(3, TOP)
    return ids, np.full((3, TOP + 1), first, np.float16)


def test_two_that_write_at_once_do_not_wait_and_the_first_whole_one_stays(entry: TaughtEntry) -> None:
    with writing(entry) as one, writing(entry) as other:
        one.add(*values(10))
        other.add(*values(20))
        other.publish()
        read = load_values(entry, ROWS, thorough=True)
        assert read is not None
        one.publish()
    assert np.array_equal(read.ids, values(20)[0])
    again = load_values(entry, ROWS, thorough=True)
    assert again is not None
    assert np.array_equal(again.logs, values(20)[1])
    assert [path.name for path in entry.folder.parent.iterdir()] == [entry.folder.name]


def test_a_damaged_one_is_none_and_makes_room(entry: TaughtEntry) -> None:
    for first in (10, 20):
        with writing(entry) as writer:
            writer.add(*values(first))
            writer.publish()
        found = load_values(entry, ROWS, thorough=True)
        assert found is not None
        assert np.array_equal(found.ids, values(first)[0])
        raw = bytearray((entry.folder / "ids.bin").read_bytes())
        raw[0] ^= 1
        (entry.folder / "ids.bin").write_bytes(raw)
        assert load_values(entry, ROWS, thorough=True) is None


def test_a_row_finds_its_own_whatever_is_beside_it(entry: TaughtEntry) -> None:
    with writing(entry) as writer:
        writer.add(*values(10))
        writer.publish()
    found = load_values(entry, ROWS, thorough=False)
    assert found is not None
    assert found.offsets.tolist() == [0, 2, 3]
