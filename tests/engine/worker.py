"""Run by mpirun: steps of many cases in one launch; every rank reports digests of what should agree.

For each case: the losses, a digest of the first step's gradients, a digest of the weights after all steps, and on
rank 0 the comparison with the whole-model reference where the case asks for it.
"""

from __future__ import annotations

import json
import os
import sys
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from support.mpi import report
from support.references import RowLosses, our_losses, reference_gradients, stock_losses
from support.stepping import (
    Case,
    batches_of,
    counted_tokens,
    digest,
    gathered_gradients,
    own_batches,
    trainer_of,
    whole_weights,
)

from mlx_empire.comm.connect import connect
from mlx_empire.comm.failure import guard
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.plan.step_traffic import step_traffic
from mlx_empire.plan.traffic import card_bytes

# The whole model's gradients depend on these fields of a case.
MATTERS = ("family", "config", "tied", "micro_batches", "cells", "rows", "width", "packed", "taught")
REFERENCES = "MLX_EMPIRE_TEST_REFERENCES"  # the folder in which launches find them
LOSS = " loss"  # no tensor's name


def run_case(case: Case, comm: Communicator, compare: bool) -> dict[str, Any]:
    """Everything a test may want to know about one case."""
    found: dict[str, Any] = {"losses": [], "norms": []}
    with CommThread() as thread:
        trainer = trainer_of(case, comm, thread)
        batches = batches_of(case)
        own = own_batches(trainer, batches, comm.rank)
        loss = trainer.compute(own, counted_tokens(batches))
        gradients = gathered_gradients(trainer, comm)
        found["gradients"] = digest(gradients)
        if compare and comm.rank == 0:
            found |= against_reference(case, comm.size, loss, gradients)
        trainer.gradients.clear()
        for step in range(case.steps):
            batches = batches_of(case, step)
            before = comm.traffic.snapshot()
            result = trainer.train_step(
                own_batches(trainer, batches, comm.rank),
                counted_tokens(batches),
                step + 1,
                case.learning_rate,
            )
            moved = comm.traffic.since(before)
            found["losses"].append(result.loss)
            found["norms"].append(result.gradient_norm)
        found["moved"] = [sum(moved.sent), sum(moved.received)]
        found["planned"] = list(card_bytes(step_traffic(trainer.store.plan, trainer.work))[comm.rank])
        found["weights"] = digest(whole_weights(trainer))
    return found


def against_reference(case: Case, size: int, loss: float, gradients: dict[str, np.ndarray]) -> dict[str, Any]:
    """Largest relative errors, and what is not equal bit for bit where both take the cross entropy by our formula."""
    asked = json.dumps({name: getattr(case, name) for name in MATTERS})
    same_loss, same = reference(asked, size, our_losses)
    expected_loss, expected = reference(asked, size, stock_losses)
    assert gradients.keys() == expected.keys()
    errors = {
        name: float(np.abs(gradients[name] - g).max() / (np.abs(g).max() + 1e-12))
        for name, g in expected.items()
    }
    norms = [
        np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in of.values())) for of in (gradients, expected)
    ]
    unequal = [name for name, g in same.items() if not np.array_equal(gradients[name], g)]
    added_up_alike = loss == same_loss or case.taught  # its two parts are added up first
    return {
        "loss_error": abs(loss - expected_loss) / abs(expected_loss),
        "gradient_error": max(errors.values()),
        "norm_error": abs(norms[0] - norms[1]) / norms[1],
        "unequal": unequal + ["the loss"] * (not added_up_alike),
    }


@cache
def reference(asked: str, size: int, by_row: RowLosses) -> tuple[float, dict[str, np.ndarray]]:
    """The whole model's, once for all cases that differ in what must not matter; also of other launches, where the
    test has a folder for it: where cells are given the number of ranks does not matter either."""
    case = Case(**json.loads(asked))
    if REFERENCES not in os.environ or case.cells == "auto":
        return reference_gradients(case, size, by_row=by_row)
    file = Path(os.environ[REFERENCES], f"{sha256((asked + by_row.__name__).encode()).hexdigest()}.npz")
    if not file.exists():
        loss, gradients = reference_gradients(case, size, by_row=by_row)
        np.savez(file, **gradients, **{LOSS: np.float64(loss)})
    with np.load(file) as known:
        return float(known[LOSS]), {name: known[name] for name in known.files if name != LOSS}


if __name__ == "__main__":
    routes = {route: connect(route, bucket_bytes=8192) for route in ("auto", "direct", "relay")}
    with guard(routes["auto"]):
        for key, fields in json.loads(sys.argv[1]).items():
            compare = fields.pop("compare", False)
            fields["shares"] = tuple(fields.get("shares", (1.0,)))
            case = Case(**fields)
            report({key: run_case(case, routes[case.route], compare)})
