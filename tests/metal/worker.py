"""Started under the watch: a step of each setting that it is told; prints as JSON what each step evaluated.

The default stream plays the GPU: whatever asks for the CPU, and every load of a file, gets another stream.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import mlx.core as mx
from metal.settings import SETTINGS
from support.stepping import Case, batches_of, counted_tokens, own_batches, trainer_of
from support.tuning import TunedCase, tuned_trainer
from support.watching import Watch

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread

CPU = mx.new_stream(mx.cpu)


def tell_streams_apart() -> None:
    """From now on "the CPU" is a stream of its own."""
    stream, load = mx.stream, mx.load

    def chosen(where: Any) -> Any:
        return stream(CPU if where == mx.cpu else where)

    def loaded(*args: Any, **keywords: Any) -> Any:
        return load(*args, **{**keywords, "stream": CPU})

    mx.stream, mx.load = chosen, loaded


def gpu_stream() -> int:
    """The number of the stream that plays the GPU."""
    watch = Watch()
    with watch.during():
        mx.eval(mx.ones(1) + 1)
    return watch.seen[0].kinds[0].stream


def steps_of(case: Case, watch: Watch) -> None:
    """Load, and two steps: the second one evaluates nothing that is made once."""
    comm = SoloCommunicator("here")
    with CommThread() as thread:
        with watch.during():
            trainer = (tuned_trainer if isinstance(case, TunedCase) else trainer_of)(case, comm, thread)
        for step in range(2):
            batches = batches_of(case, step)
            own = own_batches(trainer, batches, 0)
            with watch.during():
                trainer.train_step(own, counted_tokens(batches), step + 1, case.learning_rate)


if __name__ == "__main__":
    tell_streams_apart()
    print(json.dumps({"gpu": gpu_stream()}), flush=True)
    for name in json.loads(sys.argv[1]) or SETTINGS:
        watch = Watch()
        steps_of(SETTINGS[name], watch)
        print(json.dumps({name: [asdict(seen) for seen in watch.seen]}), flush=True)
