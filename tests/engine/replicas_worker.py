"""Runs on every rank: replicas that agree, and one bit that does not, at every stage that keeps replicas."""

import mlx.core as mx
import numpy as np
from support.mpi import report
from support.stepping import Case, batches_of, counted_tokens, trainer_of

from mlx_empire.checkpoint.agree import replicas_agree
from mlx_empire.comm.buffers import host_view
from mlx_empire.comm.connect import connect
from mlx_empire.comm.thread import CommThread
from mlx_empire.errors import NumericsError

comm = connect(deadline_seconds=60.0)
told = {}
for stage in (0, 1, 2, 3):
    with CommThread() as thread:
        case = Case("llama", micro_batches=comm.size, cells=comm.size, stage=stage)
        trainer = trainer_of(case, comm, thread)
        for step in (0, 1):
            batches = batches_of(case, step)
            own = [batches[j] for cell in trainer.work.layout.of_rank(comm.rank) for j in cell]
            trainer.train_step(own, counted_tokens(batches), step + 1, 1e-3)
        store = trainer.store
        replicas_agree(store, comm)
        if stage == 3:
            continue
        array = store.whole(1)[0]
        if stage == 0:
            array = next(iter(store.chunks[1][0][0].state.values()))
        mx.eval(array)
        if comm.rank == comm.size - 1:
            host_view(array).view(np.uint8)[5] ^= 4
        try:
            replicas_agree(store, comm)
        except NumericsError as error:
            told[stage] = [str(error), error.shared]
report({"told": told, "hostname": comm.hostname})
