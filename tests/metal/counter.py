"""Started under the watch: evaluations with work in the second step of SmolLM2's kind of model, small, in bfloat16."""

from __future__ import annotations

import json

from metal.watching import evaluations
from support.stepping import Case, batches_of, counted_tokens, own_batches, trainer_of

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread

if __name__ == "__main__":
    with CommThread() as thread:
        for layers in (4, 8):
            for micro_batches in (1, 3):
                case = Case(
                    tied=True,
                    dtype="bfloat16",
                    state_bits=8,
                    micro_batches=micro_batches,
                    config={"num_hidden_layers": layers},
                )
                trainer = trainer_of(case, SoloCommunicator("here"), thread)
                for step in range(2):
                    batches, before = batches_of(case, step), sum(evaluations())
                    own = own_batches(trainer, batches, 0)
                    trainer.train_step(own, counted_tokens(batches), step + 1, case.learning_rate)
                    found = sum(evaluations()) - before
                chunks = sum(len(chunks) for unit in trainer.store.chunks for chunks in unit)
                print(json.dumps([[layers, micro_batches], found, chunks]), flush=True)
