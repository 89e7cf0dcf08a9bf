"""Started under the watch: evaluations with work (of them the update's) and stops of the main thread in the second step
of SmolLM2's kind of model, in bfloat16, small or with layers of its size; as JSON, a line for each (layers,
micro-batches, stage, whether it runs ahead, the totals' dtype, whether layers have SmolLM2's size, and how many are not
recomputed)."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from support.stepping import VOCABULARY, Case, batches_of, counted_tokens, own_batches, trainer_of
from support.tiny_models import SMOLLM2
from support.watching import evaluations

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.plan.actions import Action


class ByKind:
    """In a trace's place: evaluations with work and stops, by the kind of the action in which they came."""

    def __init__(self) -> None:
        self.worked, self.stops = Counter[str](), Counter[str]()

    @contextmanager
    def action(self, action: Action) -> Iterator[None]:
        before = evaluations()
        yield
        blocking, asynchronous, stops = (now - then for now, then in zip(evaluations(), before, strict=True))
        self.worked[action.kind] += blocking + asynchronous
        self.stops[action.kind] += stops


if __name__ == "__main__":
    with CommThread() as thread:
        for layers, micro_batches, stage, run_ahead, totals, wide, tail in json.loads(sys.argv[1]):
            sizes = {**SMOLLM2, "vocab_size": VOCABULARY} if wide else {}
            case = Case(
                tied=True,
                dtype="bfloat16",
                state_bits=8,
                stage=stage,
                micro_batches=micro_batches,
                run_ahead=run_ahead,
                tail=tail,
                gradient_dtype=totals,
                config={**sizes, "num_hidden_layers": layers},
            )
            trainer = trainer_of(case, SoloCommunicator("here"), thread)
            trainer.gradients.reuse(1 << 40)
            for step in range(2):
                trainer.streamed.trace = kinds = ByKind()
                batches, before = batches_of(case, step), evaluations()
                own = own_batches(trainer, batches, 0)
                trainer.train_step(own, counted_tokens(batches), step + 1, case.learning_rate)
                blocking, asynchronous, stops = (
                    now - then for now, then in zip(evaluations(), before, strict=True)
                )
            chunks = sum(len(chunks) for unit in trainer.store.chunks for chunks in unit)
            found = {
                "evaluations": blocking + asynchronous,
                "stops": stops,
                "chunks": chunks,
                "update": kinds.worked["update"],
                "embed": [kinds.worked["embed"], kinds.stops["embed"]],
            }
            print(
                json.dumps([[layers, micro_batches, stage, run_ahead, totals, wide, tail], found]),
                flush=True,
            )
