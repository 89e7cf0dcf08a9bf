"""Micro-batches: shapes, padding, counts, and that nothing depends on how many ranks read them."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_empire.data.batches import micro_batch, positions, valid_tokens, validation_micro_batches
from mlx_empire.data.encode import Document
from mlx_empire.data.order import Shuffled
from mlx_empire.data.rows import Dataset, build_table


def make_dataset(lengths: list[int], width: int, packing: bool) -> Dataset:
    """Documents in which every token is unique and every third target is masked."""
    documents = []
    for number, length in enumerate(lengths):
        counted = (np.arange(length) % 3 != 2).astype(np.uint8)
        counted[0] = 0
        documents.append(Document(f"a:{number}", np.arange(length, dtype=np.int32) + number * 1000, counted))
    table, _ = build_table(documents, width, splittable=True, packing=packing)
    assert table is not None
    return Dataset(table, width, packing)


def pairs(batch) -> Counter:
    chosen = batch.mask == 1
    return Counter(zip(batch.inputs[chosen].tolist(), batch.targets[chosen].tolist(), strict=True))


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=20),
    width=st.integers(4, 50),
    packing=st.booleans(),
    micro_size=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_counts_every_target_exactly_once(lengths, width, packing, micro_size, seed):
    dataset = make_dataset(lengths, width, packing)
    count = len(dataset)
    # Steps of `count * micro_size` rows: micro_size whole epochs in each.
    batches = [
        micro_batch(
            dataset, Shuffled(count, seed), 2, index, global_size=count * micro_size, micro_size=micro_size
        )
        for index in range(count)
    ]
    seen = sum((pairs(batch) for batch in batches), Counter())
    assert set(seen.values()) == {micro_size}
    assert len(seen) == dataset.tokens_per_epoch
    assert sum(seen.values()) == valid_tokens(
        dataset, Shuffled(count, seed), 2, global_size=count * micro_size
    )
    computed = positions(
        dataset, Shuffled(count, seed), 2, global_size=count * micro_size, micro_size=micro_size
    )
    assert computed == sum(batch.inputs.size for batch in batches)
    assert Counter(row for batch in batches for row in batch.rows_read) == Counter(
        dict.fromkeys(range(count), micro_size)
    )


def test_positions_are_what_is_computed_and_targets_what_counts():
    """By hand: rows of 64, 64, 30 and 10 positions, two a micro-batch, padded to multiples of 32 up to 64."""
    dataset = make_dataset([65, 65, 31, 11], 64, packing=False)
    assert dataset.positions_per_row.tolist() == [64, 64, 30, 10]
    sizes = {"global_size": 4, "micro_size": 1}
    assert positions(dataset, Shuffled(4, 0), 0, **sizes) == 64 + 64 + 32 + 32
    assert valid_tokens(dataset, Shuffled(4, 0), 0, global_size=4) == 43 + 43 + 20 + 7
    full = make_dataset([65] * 4, 64, packing=False)
    assert positions(full, Shuffled(4, 0), 0, **sizes) == 4 * 64, "as the plan counts them: whole rows"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_only_choose_which_micro_batches_they_read(ranks):
    dataset = make_dataset([5, 9, 33, 12, 7, 21, 40], 16, packing=True)
    whole = [
        micro_batch(dataset, Shuffled(len(dataset), 5), 4, index, global_size=12, micro_size=2)
        for index in range(6)
    ]
    shared = {
        index: micro_batch(dataset, Shuffled(len(dataset), 5), 4, index, global_size=12, micro_size=2)
        for rank in range(ranks)
        for index in range(rank, 6, ranks)
    }
    for index, expected in enumerate(whole):
        assert shared[index].rows_read == expected.rows_read
        assert np.array_equal(shared[index].inputs, expected.inputs)


def test_a_larger_micro_batch_holds_the_same_rows():
    dataset = make_dataset([5, 9, 33, 12, 7, 21, 40], 16, packing=False)
    rows = {
        size: [
            row
            for index in range(12 // size)
            for row in micro_batch(
                dataset, Shuffled(len(dataset), 5), 4, index, global_size=12, micro_size=size
            ).rows_read
        ]
        for size in (1, 2, 3, 4, 6, 12)
    }
    assert all(read == rows[1] for read in rows.values())


def test_widths_are_multiples_of_32_or_the_sequence_length():
    dataset = make_dataset([11, 34, 101], 100, packing=False)
    widths = {
        len(dataset.row(index).inputs): micro_batch(
            dataset, Shuffled(3, 0), 0, place, global_size=3, micro_size=1
        ).inputs.shape
        for place in range(3)
        for index in micro_batch(dataset, Shuffled(3, 0), 0, place, global_size=3, micro_size=1).rows_read
    }
    assert widths == {10: (1, 32), 33: (1, 64), 100: (1, 100)}


def test_padding_is_zero_masked_and_a_document_of_its_own():
    dataset = make_dataset([6, 4, 3], 40, packing=True)
    batch = micro_batch(dataset, Shuffled(len(dataset), 0), 0, 0, global_size=1, micro_size=1)
    filled = 5 + 3 + 2
    assert batch.documents is not None
    assert batch.documents[0].tolist() == [0] * 5 + [1] * 3 + [2] * 2 + [-1] * (32 - filled)
    for array in (batch.inputs, batch.targets, batch.mask):
        assert not array[0, filled:].any()
    types = [array.dtype for array in (batch.inputs, batch.targets, batch.mask, batch.documents)]
    assert types == [np.int32, np.int32, np.float32, np.int32]


@pytest.mark.parametrize("packing", [True, False])
def test_the_mask_is_that_of_the_target_at_its_place(packing):
    dataset = make_dataset([9, 5, 7], 40, packing)
    batch = micro_batch(dataset, Shuffled(len(dataset), 0), 0, 0, global_size=1, micro_size=1)
    for target, mask in zip(batch.targets[0], batch.mask[0], strict=True):
        assert mask == (target > 0 and target % 1000 % 3 != 2)


def test_rows_that_are_not_packed_have_no_document_ids():
    dataset = make_dataset([6, 4], 40, packing=False)
    assert (
        micro_batch(dataset, Shuffled(len(dataset), 0), 0, 0, global_size=2, micro_size=2).documents is None
    )


def test_validation_reads_every_row_once_in_an_order_of_its_own():
    dataset = make_dataset([5] * 11, 16, packing=False)
    batches = list(validation_micro_batches(dataset, 4))
    assert [len(batch.rows_read) for batch in batches] == [4, 4, 3]
    assert sorted(row for batch in batches for row in batch.rows_read) == list(range(11))
    again = list(validation_micro_batches(dataset, 4, limit=2))
    assert [batch.rows_read for batch in again] == [batch.rows_read for batch in batches[:2]]
