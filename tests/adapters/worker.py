"""Run by mpirun: steps of many tuned cases in one launch; every rank reports losses, norms and digests."""

from __future__ import annotations

import json
import sys
from typing import Any

from support.mpi import report
from support.stepping import batches_of, counted_tokens, digest, own_batches, whole_weights
from support.tuning import TunedCase, tuned_trainer

from mlx_empire.comm.connect import connect
from mlx_empire.comm.failure import guard
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.plan.step_traffic import step_traffic
from mlx_empire.plan.traffic import card_bytes


def run_case(case: TunedCase, comm: Communicator) -> dict[str, Any]:
    """What must not depend on the number of ranks, and the bytes that the last step moved."""
    found: dict[str, Any] = {"losses": [], "norms": []}
    with CommThread() as thread:
        trainer = tuned_trainer(case, comm, thread)
        for step in range(case.steps):
            batches, before = batches_of(case, step), comm.traffic.snapshot()
            own = own_batches(trainer, batches, comm.rank)
            total, strength = counted_tokens(batches), case.strength(step)
            result = trainer.train_step(own, total, step + 1, case.learning_rate, strength)
            moved = comm.traffic.since(before)
            found["losses"].append(result.loss)
            found["norms"].append(result.gradient_norm)
        found["moved"] = [sum(moved.sent), sum(moved.received)]
        found["planned"] = list(card_bytes(step_traffic(trainer.store.plan, trainer.work))[comm.rank])
        found["weights"] = digest(whole_weights(trainer))
    return found


if __name__ == "__main__":
    world = connect(bucket_bytes=8192)
    with guard(world):
        for key, fields in json.loads(sys.argv[1]).items():
            case = TunedCase(**{**fields, "shares": tuple(fields.get("shares", (1.0,)))})
            report({key: run_case(case, world)})
