"""Run by mpirun: two training steps of many settings; rank 0 reports what they gave, to the last bit."""

from __future__ import annotations

import json
import sys
from typing import Any

from oracle.plans import case_of
from oracle.settings import SETTINGS
from support.mpi import report
from support.stepping import Case, batches_of, counted_tokens, digest, own_batches, trainer_of, whole_weights
from support.tuning import TunedCase, tuned_trainer

from mlx_empire.comm.connect import connect
from mlx_empire.comm.failure import guard
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread


def bits_of(case: Case, comm: Communicator) -> dict[str, Any]:
    """Losses and gradient norms of the steps, a digest of the weights after them, bytes that each rank sent in one."""
    losses, norms = [], []
    with CommThread() as thread:
        trainer = (tuned_trainer if isinstance(case, TunedCase) else trainer_of)(case, comm, thread)
        for step in range(case.steps):
            batches, before = batches_of(case, step), comm.traffic.snapshot()
            own = own_batches(trainer, batches, comm.rank)
            result = trainer.train_step(own, counted_tokens(batches), step + 1, case.learning_rate)
            sent = comm.gather_json(comm.traffic.since(before).sent)
            losses.append(result.loss)
            norms.append(result.gradient_norm)
        weights = digest(whole_weights(trainer))
    return {"losses": losses, "norms": norms, "weights": weights, "sent": sent}


if __name__ == "__main__":
    routes = {route: connect(route, bucket_bytes=8192) for route in ("auto", "direct", "relay")}
    with guard(routes["auto"]):
        for name in json.loads(sys.argv[1]):
            case = case_of(SETTINGS[name], routes["auto"].size)
            report({name: bits_of(case, routes[case.route])})
