"""Run by mpirun from step_clock.py: the trainer's own steps and messages, with computation replaced by sleeping."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import mlx.core as mx
import numpy as np
from support.stepping import Case, batches_of, counted_tokens, own_batches, trainer_of

from mlx_empire.comm.connect import connect
from mlx_empire.comm.failure import guard
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.layer_calls import Running
from mlx_empire.engine.passes import Passes
from mlx_empire.engine.trace import StepTrace
from mlx_empire.engine.update import Updater
from mlx_empire.plan.actions import Action
from mlx_empire.plan.step_time import COMPUTE, Event, Link, step_timeline
from mlx_empire.plan.traffic import DEFAULT_BUCKET_BYTES

LAYERS, HIDDEN, WIDTH = 6, 192, 8
TIMES = {"forward": 1.0, "head": 3.0, "backward": 3.0}  # in a layer's forward


class Sleeping(Passes):
    """Every pass takes its time and gives gradients of zeros."""

    seconds = 0.0

    def forward(self, layer: int, r: Running, *, keep_input: bool) -> None:
        time.sleep(TIMES["forward"] * self.seconds)

    def head(self, r: Running, weights: Mapping[int, Any], total: mx.array, *, onward: bool) -> Any:
        time.sleep((TIMES["head"] + TIMES["backward"] * len(weights)) * self.seconds)
        r.loss = mx.zeros(r.batch[0].shape[0])
        return [zeros(a) for a in self._heads()], {i: [zeros(a) for a in own] for i, own in weights.items()}

    def backward(self, layer: int, r: Running, weights: list[mx.array], *, onward: bool) -> list[mx.array]:
        time.sleep(TIMES["backward"] * self.seconds)
        return [zeros(a) for a in weights]

    def embed(self, r: Running) -> list[mx.array]:
        root = self._store.bound(0)
        return [zeros(root[i]) for i in self.embed_tensors]


class Costs:
    """A rank's calibration for the clock: what each kind of pass took in the steps that were measured.

    That is its sleep, and what Python, the sums of gradients and a core's other work add to it; no message is in it.
    """

    def __init__(self, events: Sequence[Event]) -> None:
        took: dict[str, list[float]] = {}
        for event in events:
            if event.lane == COMPUTE and event.what in (*TIMES, "embed", "update"):
                took.setdefault(event.what, []).append(event.end - event.start)
        self._seconds = {kind: mean(seconds) for kind, seconds in took.items()}

    def compute(self, action: Action) -> float:
        return action.times * self._seconds.get(action.kind, 0.0)

    def add(self, nbytes: int) -> float:
        return 0.0


_ZEROS: dict[tuple[int, ...], mx.array] = {}


def zeros(like: mx.array) -> mx.array:
    """Zeros of a shape, made once."""
    if like.shape not in _ZEROS:
        _ZEROS[like.shape] = mx.zeros(like.shape)
        mx.eval(_ZEROS[like.shape])
    return _ZEROS[like.shape]


def link_of(comm: Communicator) -> Link:
    """The wire as gathers show it: seconds of one that moves next to nothing, and a card's bytes per second beyond."""

    def seconds(each: int, times: int) -> float:
        buffer, edges = np.zeros(each * comm.size, np.float32), [each * r for r in range(comm.size + 1)]
        comm.barrier(600)
        start = time.perf_counter()
        for _ in range(times):
            comm.all_gather(buffer, edges)
        return max(comm.gather_json(time.perf_counter() - start)) / times

    latency = median(seconds(16, 10) for _ in range(10))
    each = 1 << 19
    gather = median(seconds(each, 1) for _ in range(10))
    return Link(4 * each * (comm.size - 1) / (gather - latency), latency=latency)


def run(setting: dict[str, Any], comm: Communicator, link: Link, steps: int) -> dict[str, Any]:
    """Seconds of each step on the slowest rank, and what the clock says."""
    tail = setting.get("tail", 0)
    config = {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "head_dim": HIDDEN // 4,
    }
    case = Case(
        family="llama",
        shares=tuple(setting["shares"]),
        stage=setting["stage"],
        micro_batches=setting["each"] * comm.size,
        cells=setting.get("cells", comm.size),
        tail=tail,
        rows=1,
        width=setting.get("width", WIDTH),
        config=config,
    )
    with CommThread() as thread:
        trainer = trainer_of(case, comm, thread)
        if setting["forward"]:  # else the passes compute
            trainer.streamed._passes.__class__ = Sleeping
            trainer.streamed._passes.seconds = setting["forward"]
        batches = batches_of(case)
        own, total, seconds = own_batches(trainer, batches, comm.rank), counted_tokens(batches), []
        trace = StepTrace(comm.rank)
        for step in range(steps + 1):
            trainer.observe(trace if step else None)
            comm.barrier(600)
            start = time.perf_counter()
            trainer.train_step(own, total, step + 1, 1e-4)
            seconds.append(max(comm.gather_json(time.perf_counter() - start)))
        costs = [Costs([Event(*e) for e in events]) for events in comm.gather_json(trace.events)]
        work = replace(trainer.work, bucket_bytes=DEFAULT_BUCKET_BYTES)  # those of the communicator
        timeline = step_timeline(trainer.store.plan, work, costs, link)
    return {"seconds": seconds[1:], "predicted": timeline.seconds}


def main() -> None:
    """Every setting; rank 0 writes."""
    comm = connect()
    with guard(comm):
        Updater._update_segment = lambda *_: None  # type: ignore[method-assign]
        link = link_of(comm)
        found = [run(one, comm, link, int(sys.argv[2])) for one in json.loads(sys.argv[3])]
        if comm.rank == 0:
            Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
