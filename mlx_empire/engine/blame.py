"""What is said of a step whose loss or gradient is not finite: of which rank, and what may be the cause.

All ranks know the same facts by then, so they raise the same error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlx_empire.comm.protocol import Communicator
from mlx_empire.engine.numerics import GradientError, bad_weights, some_of
from mlx_empire.engine.store import ShardStore
from mlx_empire.engine.update import Updater
from mlx_empire.errors import NumericsError, on_all_ranks


def loss_error(
    step: int, loss: float, losses: Sequence[float], store: ShardStore, comm: Communicator, changed: str
) -> NumericsError:
    """Whose loss is not finite (`losses`: this rank's), and whether a weight is not. Collective."""
    finite = comm.gather_json(all(map(math.isfinite, losses)))
    where = ", ".join(f"{r} ({comm.hostnames[r]})" for r, own in enumerate(finite) if not own)
    weights = bad_weights(store, comm)
    cause = "all weights are finite: look at the data of this step and at the learning rate"
    if weights:
        rank = weights[0][1]
        cause = f"{some_of([n for n, _ in weights])} is not finite on rank {rank} ({comm.hostnames[rank]})"
    return _shared(f"step {step}: the loss is {loss}, computed by rank {where}; {cause}; {changed}")


def gradient_error(
    step: int,
    error: GradientError,
    scale: float,
    suspects: Sequence[Sequence[str]],
    comm: Communicator,
    updater: Updater,
) -> NumericsError:
    """Whose contribution it was. `suspects`: by rank the tensors of its own sums, computed once more. Collective."""
    what = _what(step, error, scale)
    guilty = [f"{r} ({comm.hostnames[r]})" for r, names in enumerate(suspects) if names]
    if guilty:
        return _shared(f"{what}, computed by rank {', '.join(guilty)}; {updater.changed}")
    try:
        updater.norm()
    except GradientError:
        cause = "every rank's own part is finite, their sum overflows; lower the learning rate"
        return _shared(f"{what}: {cause}; {updater.changed}")
    cause = "but it is when computed again: a machine's memory or network is at fault"
    return _shared(f"{what}, {cause}; {updater.changed}")


def released_error(step: int, error: GradientError, scale: float, updater: Updater) -> NumericsError:
    """The same where units are updated in the backward: nothing can be computed once more."""
    return _shared(f"{_what(step, error, scale)}; {updater.changed}")


def _what(step: int, error: GradientError, scale: float) -> str:
    what = f"step {step}: the gradient of {some_of(error.tensors)} is not finite"
    if scale > 1:
        what += f" (times a loss scale of {scale:.0f}, which may be the cause: take a smaller one)"
    return what


def _shared(message: str) -> NumericsError:
    error = NumericsError(message)
    on_all_ranks(error)
    return error
