"""The held-out loss: mean cross-entropy per counted token over the validation split, streamed like a step.

The micro-batches are dealt to the ranks in order, a group at a time, and the losses are summed in the order of the
micro-batches in fp64, so the figure does not depend on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mlx_empire.comm.protocol import Communicator
from mlx_empire.data.batches import MicroBatch, counted
from mlx_empire.engine.step import StreamedStep


def held_out_loss(
    step: StreamedStep, comm: Communicator, batches: Sequence[MicroBatch], per_rank: int
) -> float:
    """Mean loss over all counted tokens of `batches`; collective.

    At most `per_rank` micro-batches pass a rank at once, so that evaluation needs no more memory than a step. A rank
    whose share of the last group is empty still joins the gathers.
    """
    total = sum(counted(b) for b in batches)
    group = comm.size * per_rank
    losses: list[float] = []
    for first in range(0, len(batches), group):
        start = first + comm.rank * per_rank
        own = step.losses(batches[start : min(start + per_rank, len(batches))], total)
        for values in comm.gather_arrays(np.array(own, np.float64)):
            losses += values.tolist()
    return math.fsum(losses)
