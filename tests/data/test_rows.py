"""Splitting, cutting and packing: no target lost, repeated or moved into another document."""

import tracemalloc
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_empire.data.encode import Document
from mlx_empire.data.order import fixed_permutation
from mlx_empire.data.rows import COUNTED_ROWS, Dataset, Table, build_table, packed_rows

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=30)


def make_documents(lengths: list[int], masked: bool = False) -> list[Document]:
    """Every token is document * 1000 + position. Masked: only the last third counts."""
    documents = []
    for number, length in enumerate(lengths):
        counted = np.ones(length, np.uint8)
        counted[: length * 2 // 3 if masked else 1] = 0
        documents.append(Document(f"a:{number}", np.arange(length, dtype=np.int32) + number * 1000, counted))
    return documents


def targets_of(dataset: Dataset) -> Counter:
    """All (input, target) pairs that count, over all rows."""
    pairs: Counter = Counter()
    for index in range(len(dataset)):
        row = dataset.row(index)
        pairs.update((int(i), int(t)) for i, t, m in zip(*row[:3], strict=True) if m)
    return pairs


@given(lengths=LENGTHS, width=st.integers(1, 17), packing=st.booleans(), masked=st.booleans())
@settings(max_examples=200, deadline=None)
def test_split_documents_keep_every_target_exactly_once(lengths, width, packing, masked):
    documents = make_documents(lengths, masked)
    wanted = {
        (int(document.tokens[p - 1]), int(document.tokens[p]))
        for document in documents
        for p in range(1, len(document.tokens))
        if document.counted[p]
    }
    table, counts = build_table(documents, width, splittable=True, packing=packing)
    assert counts.documents == len(lengths)
    assert counts.cut == 0
    if table is None:
        assert not wanted
        return
    dataset = Dataset(table, width, packing)
    assert targets_of(dataset) == Counter(dict.fromkeys(wanted, 1))
    assert dataset.tokens_per_epoch == len(wanted)
    for index in range(len(dataset)):
        row = dataset.row(index)
        assert 0 < len(row.inputs) <= width
        assert dataset.targets_per_row[index] == row.mask.sum() > 0
        # A document id stands for consecutive positions of one document, each target one token ahead.
        assert (row.targets == row.inputs + 1).all()
        for number in set(row.documents.tolist()):
            inputs = row.inputs[row.documents == number]
            assert (np.diff(inputs) == 1).all()
        assert (np.diff(row.documents) >= 0).all()
        assert packing or set(row.documents.tolist()) == {0}


@given(lengths=LENGTHS, width=st.integers(1, 17), packing=st.booleans())
@settings(max_examples=100, deadline=None)
def test_cut_documents_keep_their_beginning_and_are_counted(lengths, width, packing):
    documents = make_documents(lengths)
    wanted = {
        (int(document.tokens[p - 1]), int(document.tokens[p]))
        for document in documents
        for p in range(1, min(len(document.tokens), width + 1))
    }
    table, counts = build_table(documents, width, splittable=False, packing=packing)
    assert counts.cut == sum(length > width + 1 for length in lengths)
    assert counts.dropped == sum(length < 2 for length in lengths)
    assert (table is None) == (not wanted)
    if table is not None:
        assert set(targets_of(Dataset(table, width, packing))) == wanted


def test_a_long_text_splits_at_its_targets():
    table, _ = build_table(make_documents([9]), 4, splittable=True, packing=False)
    assert table is not None
    dataset = Dataset(table, 4, False)
    assert [dataset.row(i).inputs.tolist() for i in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [dataset.row(i).targets.tolist() for i in range(2)] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert len(dataset) == 2


def test_packing_fills_rows_where_whole_documents_fit():
    lengths = [5, 3, 5, 3, 5, 3, 5, 3]  # 4 and 2 positions: rows of 6 can be exactly full
    table, _ = build_table(make_documents(lengths), 6, splittable=True, packing=True)
    assert table is not None
    dataset = Dataset(table, 6, True)
    assert len(dataset) == 4
    assert dataset.positions_per_epoch == 24
    assert all(dataset.row(i).documents.tolist() == [0, 0, 0, 0, 1, 1] for i in range(4))


def test_packing_needs_no_more_rows_than_first_fit():
    """First fit in decreasing order, written plainly, is the reference."""
    lengths = np.random.default_rng(0).integers(2, 60, 300).tolist()
    bins: list[int] = []
    for need in sorted((length - 1 for length in lengths), reverse=True):
        place = next((i for i, used in enumerate(bins) if used + need <= 64), None)
        if place is None:
            bins.append(need)
        else:
            bins[place] += need
    table, _ = build_table(make_documents(lengths), 64, splittable=False, packing=True)
    assert table is not None
    assert len(Dataset(table, 64, True)) <= len(bins)


def test_packing_is_the_same_every_time():
    lengths = np.random.default_rng(1).integers(2, 60, 100).tolist()
    first, second = (build_table(make_documents(lengths), 64, True, True)[0] for _ in range(2))
    assert first is not None
    assert second is not None
    for name, array in first.arrays().items():
        assert np.array_equal(array, second.arrays()[name])


def best_fit_by_looking_at_every_row(lengths: list[int], capacity: int) -> list[list[int]]:
    """Of the rows with least room left for a piece, the one that was left so last."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each row, and a number that grows with each piece
    shuffled = fixed_permutation(len(lengths)).tolist()
    for turn, index in enumerate(sorted(shuffled, key=lambda i: -lengths[i])):
        need = lengths[index] - 1
        fitting = [(free, -last, row) for row, (free, last) in enumerate(room) if free > 0 and free >= need]
        row = min(fitting)[2] if fitting else len(rows)
        if not fitting:
            rows.append([])
            room.append((capacity, 0))
        rows[row].append(index)
        room[row] = room[row][0] - need, turn
    return rows


@given(lengths=st.lists(st.integers(1, 18), max_size=60), width=st.integers(17, 40))
@settings(max_examples=200, deadline=None)
def test_packing_is_best_fit_longest_first(lengths, width):
    expected = best_fit_by_looking_at_every_row(lengths, width)
    order, per_row = packed_rows(np.array(lengths, np.uint32), width)
    assert per_row.tolist() == [len(row) for row in expected]
    assert order.tolist() == [index for row in expected for index in row]


def test_targets_are_counted_row_by_row_in_little_memory():
    """Rows of 1 to 900 tokens, more than are counted at once; numpy would make eight bytes of each flag."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 900, 2 * COUNTED_ROWS + 7)
    pieces = np.concatenate([[0], np.cumsum(lengths)])
    counted = rng.integers(0, 2, pieces[-1]).astype(np.uint8)
    rows = np.arange(len(pieces))
    dataset = Dataset(Table(np.zeros(len(counted), np.int32), counted, pieces, rows), 900, packed=False)
    tracemalloc.start()
    found = dataset.targets_per_row
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.tolist() == [int(part.sum()) for part in np.split(counted, pieces[1:-1])]
    assert peak < 5 * len(counted)
