"""Run by mpirun: the measured peak of training steps beside the ledger's prediction, in bytes.

How far MLX's threads are apart is a matter of chance, and other work on the cores lessens it; a run of many steps meets
the worst. So two steps are measured, and more where the peak looks low.
"""

from __future__ import annotations

import gc
import json
import sys

import mlx.core as mx
from support.mpi import report
from support.stepping import Case, batches_of, counted_tokens, optimizer_of, own_batches, trainer_of
from support.tuning import TunedCase, tuned_trainer

from mlx_empire.comm.connect import connect
from mlx_empire.comm.failure import guard
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.optim.adamw import AdamW
from mlx_empire.plan.memory import ledger

FEW, MANY, LOW = 2, 6, 0.98  # steps, and what counts as low beside the prediction


def measure(case: Case, comm: Communicator) -> dict[str, object]:
    """MLX's peak and the exchange's numpy buffers against the ledger of this rank."""
    gc.collect()
    mx.clear_cache()
    left_over = mx.get_active_memory()  # of earlier cases in this process
    with CommThread() as thread:
        made = tuned_trainer if isinstance(case, TunedCase) else trainer_of
        trainer = made(case, comm, thread)
        optimizer = AdamW(state_bits=case.state_bits) if isinstance(case, TunedCase) else optimizer_of(case)
        predicted = ledger(trainer.spec, trainer.store.plan, trainer.work, comm.rank, optimizer.state_bytes)
        trainer.gradients.reuse(predicted.spare)
        gc.collect()
        mx.reset_peak_memory()
        for step in range(1, MANY + 1):
            batches = batches_of(case, step)
            own = own_batches(trainer, batches, comm.rank)
            trainer.train_step(own, counted_tokens(batches), step, case.learning_rate)
            measured = mx.get_peak_memory() - left_over + comm.staging_bytes
            if step >= FEW and not any(comm.gather_json(measured < LOW * predicted.peak)):
                break
        return {"measured": measured, "predicted": predicted.peak, "phase": predicted.largest_phase}


if __name__ == "__main__":
    world = connect(bucket_bytes=8192)
    with guard(world):
        for key, fields in json.loads(sys.argv[1]).items():
            fields["shares"] = tuple(fields.get("shares", (1.0,)))
            report({key: measure((TunedCase if "tuning" in fields else Case)(**fields), world)})
