"""Started under the watch: evaluations with work and stops of the main thread in the second step of SmolLM2's kind of
model, small, in bfloat16; as JSON, a line for each (layers, micro-batches, stage, whether it runs ahead)."""

from __future__ import annotations

import json
import sys

from metal.watching import evaluations
from support.stepping import Case, batches_of, counted_tokens, own_batches, trainer_of

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread

if __name__ == "__main__":
    with CommThread() as thread:
        for layers, micro_batches, stage, run_ahead in json.loads(sys.argv[1]):
            case = Case(
                tied=True,
                dtype="bfloat16",
                state_bits=8,
                stage=stage,
                micro_batches=micro_batches,
                run_ahead=run_ahead,
                config={"num_hidden_layers": layers},
            )
            trainer = trainer_of(case, SoloCommunicator("here"), thread)
            for step in range(2):
                batches, before = batches_of(case, step), evaluations()
                own = own_batches(trainer, batches, 0)
                trainer.train_step(own, counted_tokens(batches), step + 1, case.learning_rate)
                blocking, asynchronous, stops = (
                    now - then for now, then in zip(evaluations(), before, strict=True)
                )
            chunks = sum(len(chunks) for unit in trainer.store.chunks for chunks in unit)
            found = {"evaluations": blocking + asynchronous, "stops": stops, "chunks": chunks}
            print(json.dumps([[layers, micro_batches, stage, run_ahead], found]), flush=True)
