"""Run by mpirun: the peak memory of training steps at stage 3, against what the design allows and the ledger predicts.

Reports bytes: `measured` (MLX's peak plus the exchange's numpy buffers) and the parts of the allowance. One layer's
recomputation is measured apart, as the peak of a plain `mx.vjp` of one layer of the same model.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from support.mpi import report
from support.stepping import Case, batches_of, counted_tokens, own_batches, trainer_of, weights_of

from mlx_empire.comm.connect import connect
from mlx_empire.comm.failure import guard
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.model.layers import SlottedModel
from mlx_empire.optim.adamw import AdamW
from mlx_empire.plan.memory import ledger
from mlx_empire.plan.workload import chunk_tokens


def recompute_peak(case: Case) -> int:
    """Peak bytes of a plain vjp of the costliest layer for one micro-batch, above weights and input."""
    model, _, values = weights_of(case)
    model.load_weights(list(values.items()))
    slotted = SlottedModel(model, case.family)
    inputs = mx.array(batches_of(case)[0].inputs)
    hidden, arguments = slotted.capture(inputs)
    mx.eval(hidden, [a.positional for a in arguments if a.positional])
    worst = 0
    for layer, given in zip(slotted.layers, arguments, strict=True):
        names, arrays = zip(*tree_flatten(layer.trainable_parameters()), strict=True)

        def call(*xs: mx.array, layer: Any = layer, names: Any = names, given: Any = given) -> mx.array:
            layer.update(tree_unflatten(list(zip(names, xs[:-1], strict=True))))
            return layer(xs[-1], *given.positional, **given.keywords)

        cotangent = mx.random.normal(hidden.shape)
        mx.eval(cotangent)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        _, gradients = mx.vjp(call, [*arrays, hidden], [cotangent])
        mx.eval(gradients)
        worst = max(worst, mx.get_peak_memory() - before)
        call(*arrays, hidden)  # leaves the layer with arrays, not tracers
    return worst


def measure(case: Case, comm: Communicator) -> dict[str, int]:
    """The parts of the allowance, the ledger's prediction and the measured peak of this rank."""
    recompute = recompute_peak(case)
    gc.collect()
    mx.clear_cache()
    left_over = mx.get_active_memory()  # of earlier cases in this process
    with CommThread() as thread:
        trainer = trainer_of(case, comm, thread)
        gc.collect()
        mx.reset_peak_memory()
        for step in (1, 2):
            batches = batches_of(case, step)
            trainer.train_step(
                own_batches(trainer, batches, comm.rank), counted_tokens(batches), step, case.learning_rate
            )
        measured = mx.get_peak_memory() - left_over + comm.staging_bytes
        plan, spec, work = trainer.store.plan, trainer.spec, trainer.work
        optimizer = AdamW(state_bits=case.state_bits)
        predicted = ledger(spec, plan, work, comm.rank, optimizer.state_bytes)
        sizes = plan.sizes[comm.rank]
        vocabulary = int(spec.text_config["vocab_size"])
        chunk = min(chunk_tokens(vocabulary, frozen=spec.frozen_root), work.tokens)
        kept = ("weights", "optimizer")
        states = sum(size for name, size in predicted.resident.items() if name.startswith(kept))
        states += sum(4 * unit.trained for unit in plan.sizes[comm.rank])  # gradients in fp32
        return {
            "measured": measured,
            "predicted": predicted.peak,
            "states": states,
            "two units": 2 * max(u.gathered_bytes for u in plan.units[1:]),
            "root and gradient": sizes[0].gathered + sizes[0].gradient,
            "unit gradient": max(s.gradient for s in sizes[1:]),
            "receive buffers": comm.staging_bytes,
            "layer inputs": predicted.phases["forward"]["layer inputs"],
            "recompute": recompute,
            "logits chunk": 3 * 4 * chunk * vocabulary,
        }


if __name__ == "__main__":
    world = connect(bucket_bytes=8192)
    with guard(world):
        for key, fields in json.loads(sys.argv[1]).items():
            fields["shares"] = tuple(fields.get("shares", (1.0,)))
            report({key: measure(Case(**fields), world)})
