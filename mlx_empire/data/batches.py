"""Decides what a micro-batch looks like: the rows it reads, its padded width, the targets that count."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mlx_empire.data.order import Order, fixed_permutation
from mlx_empire.data.rows import Rows

PAD_TO = 32  # widths are multiples of this, so that few shapes occur (each new one costs a compilation)
PADDING_DOCUMENT = -1

# What a teacher says of a micro-batch: its likeliest tokens (rows, width, top) int32, and logarithms of their
# probabilities and of the rest's (rows, width, top + 1) float16; where no target counts anything.
Teacher = Callable[[], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The rows that pass the model together, padded on the right to one width.

    inputs: (rows, width) int32 token ids, padding 0. targets: (rows, width) int32, the token that follows
    each input in its document, padding 0. mask: (rows, width) float32, 1 where the target counts, else 0.
    documents: (rows, width) int32 numbers of the documents in each row (0, 1, ...), or None when rows are not
    packed; padding is document -1, which attends to itself, so no attention row is empty. rows_read: the
    dataset's row of each row. teacher: reads what a teacher says of it, where one is asked.
    """

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    documents: np.ndarray | None
    rows_read: tuple[int, ...]
    teacher: Teacher | None = None


def micro_batch(
    dataset: Rows, order: Order, step: int, index: int, *, global_size: int, micro_size: int
) -> MicroBatch:
    """Micro-batch `index` of a step (steps count from 0): a pure function of its arguments.

    `global_size` and `micro_size` count rows; a step has global_size / micro_size micro-batches.
    """
    assert global_size % micro_size == 0, "global_size is a multiple of micro_size"
    assert 0 <= index < global_size // micro_size, "the step has no such micro-batch"
    first = step * global_size + index * micro_size
    return _collate(dataset, order.rows_at(first, micro_size))


def valid_tokens(dataset: Rows, order: Order, step: int, *, global_size: int) -> int:
    """How many targets count in the whole step, over all micro-batches: what the loss is divided by."""
    rows = order.rows_at(step * global_size, global_size)
    return int(dataset.targets_per_row[rows].sum())


def positions(dataset: Rows, order: Order, step: int, *, global_size: int, micro_size: int) -> int:
    """How many input positions pass through the layers in the whole step, over all micro-batches.

    Rows times width of each micro-batch: what is computed, so padding counts, and so do positions whose target does
    not.
    """
    rows = order.rows_at(step * global_size, global_size).reshape(-1, micro_size)
    longest = dataset.positions_per_row[rows].max(axis=1)
    return sum(micro_size * _width(dataset, int(n)) for n in longest)


def validation_micro_batches(
    dataset: Rows, micro_size: int, limit: int | None = None
) -> Iterator[MicroBatch]:
    """Yield every row once in a fixed shuffled order (so that a `limit` of micro-batches is a fair sample).

    The last micro-batch may have fewer rows than `micro_size`.
    """
    order = fixed_permutation(len(dataset))[: None if limit is None else limit * micro_size]
    for first in range(0, len(order), micro_size):
        yield _collate(dataset, order[first : first + micro_size])


def single_rows(dataset: Rows, first: int, last: int) -> list[MicroBatch]:
    """The rows from `first` up to `last` in their order, each by itself."""
    return [_collate(dataset, np.array([index])) for index in range(first, min(last, len(dataset)))]


def counted(batch: MicroBatch) -> int:
    """Number of targets that count in a micro-batch."""
    return int(np.count_nonzero(batch.mask))


def _collate(dataset: Rows, indices: np.ndarray) -> MicroBatch:
    rows = [dataset.row(int(index)) for index in indices]
    shape = (len(rows), _width(dataset, max(len(row.inputs) for row in rows)))
    inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask = np.zeros(shape, np.float32)
    documents = np.full(shape, PADDING_DOCUMENT, np.int32)
    for place, row in enumerate(rows):
        inputs[place, : len(row.inputs)] = row.inputs
        targets[place, : len(row.inputs)] = row.targets
        mask[place, : len(row.inputs)] = row.mask
        documents[place, : len(row.inputs)] = row.documents
    return MicroBatch(inputs, targets, mask, documents if dataset.packed else None, tuple(indices.tolist()))


def _width(dataset: Rows, longest: int) -> int:
    """The width to which the rows of a micro-batch are padded."""
    return min(-(-longest // PAD_TO) * PAD_TO, dataset.sequence_length)
