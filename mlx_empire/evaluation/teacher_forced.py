"""Scores of known answers by one streamed forward pass, exact also for a model that no machine holds whole.

An answer is right where each of its tokens is the likeliest after the ones before it: that is what greedy generation
would write. Micro-batches are dealt to the ranks in order, so no score depends on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_empire.comm.protocol import Communicator
from mlx_empire.data.batches import MicroBatch, validation_micro_batches
from mlx_empire.data.dataset import Dataset
from mlx_empire.data.encode import Document
from mlx_empire.data.rows import build_table
from mlx_empire.engine.step import StreamedStep
from mlx_empire.evaluation.questions import Answer


def micro_batches(answers: Sequence[Answer], sequence_length: int, micro_size: int) -> list[MicroBatch]:
    """Answers as micro-batches, one row each; `rows_read` says which answer a row is."""
    documents = (Document("", np.array(a.tokens, np.int32), np.array(a.counted, np.uint8)) for a in answers)
    table, counts = build_table(documents, sequence_length, splittable=False, packing=False)
    assert table is not None
    assert counts.cut == counts.dropped == 0, "questions are checked when they are read"
    return list(validation_micro_batches(Dataset(table, sequence_length, False), micro_size))


def score_answers(
    step: StreamedStep, comm: Communicator, batches: Sequence[MicroBatch], per_rank: int
) -> np.ndarray:
    """(answers, 3) float64: sum of log-probabilities, likeliest tokens, counted tokens. The same on every rank.

    Collective. At most `per_rank` micro-batches pass a rank at once, so evaluation needs no more memory than a step.
    """
    group = comm.size * per_rank
    found = np.zeros((sum(len(b.rows_read) for b in batches), 3))
    for first in range(0, len(batches), group):
        start = first + comm.rank * per_rank
        own = step.scores(batches[start : min(start + per_rank, len(batches))])
        flat = np.concatenate([np.empty((0, 2)), *own]).astype(np.float64).reshape(-1)
        rows = np.concatenate([part.reshape(-1, 2) for part in comm.gather_arrays(flat)])
        read = batches[first : first + group]
        places = np.array([row for b in read for row in b.rows_read], np.int64)
        found[places, :2] = rows
        found[places, 2] = np.concatenate([b.mask.sum(axis=1) for b in read])
    return found
