"""One layer of a recipe's model at its true size, trained over all ranks: what it takes, beside what is planned.

mpirun -hostfile FILE python -m mlx_empire.run.unit RECIPE --out FILE [key=value ...]

Decides what stands for the model: its first layers up to the first of the largest kind, with the true root, at random;
rows, dtype, tuning, optimizer and the plan's ZeRO stage and gradient dtype are the recipe's, every layer is recomputed,
and the tokens are drawn. Two steps are trained; the second one is timed. No weights are read, nothing is written but
`--out`, and where the model's folder is absent `model.architecture` is enough.

Exit code 3 where a rank's peak is above what its ledger says: then the ledger is not to be trusted with the whole model
on such machines. Allowed for is by how much ledgers are known to be too low, for MLX's threads free by chance; and
where the optimizer is the peak, one call's temporaries, which may be there still when the next one's are made. What was
measured takes the place of what is estimated: `mlx-empire capacity --unit FILE` refuses the same, and plans with the
measured speed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_empire.cluster.hostfile import Node
from mlx_empire.cluster.machine import Calibration, computes_on_gpu, measured_memory_rate
from mlx_empire.comm.connect import connect
from mlx_empire.comm.failure import guard, together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.data.batches import MicroBatch
from mlx_empire.disk import replace_private
from mlx_empire.engine.trace import StepTrace
from mlx_empire.errors import DoesNotFitError, UserArguments, UserError, on_all_ranks
from mlx_empire.model.attention.fused import refuse_too_short
from mlx_empire.model.scaled_down import first_layers
from mlx_empire.model.spec import ModelSpec
from mlx_empire.model.target import Target
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.resolve import resolve
from mlx_empire.plan.shares import RunPlan
from mlx_empire.plan.step_time import COMPUTE, EXCHANGE, Event
from mlx_empire.plan.wired_limit import fitting_plan
from mlx_empire.plan.work import unit_flops
from mlx_empire.recipe.changes import variant
from mlx_empire.recipe.schema import Recipe
from mlx_empire.recipe.text import read_small_text
from mlx_empire.report.html import refuse_source
from mlx_empire.run.agree import share_config, share_nodes, share_recipe, share_target
from mlx_empire.run.trainer import explaining_memory, limit_memory, load_weights, make_trainer
from mlx_empire.sizes import amount

STEPS = 2
KNOWN_UNDER = 0.01  # of the peak; at worst a ledger was measured 0.7 % too low (docs/measured.md)
MOST_FILE_BYTES = 1 << 20
REMEDY = "`mlx-empire doctor HOSTFILE --unit RECIPE` writes one"
# The seconds that are told: of which actions, by what they come to.
PARTS = {
    **{name: (name,) for name in ("forward", "backward", "update")},
    "gather": ("gather", "renew"),
    "reduce": ("reduce", "replicate"),
}


@dataclass(frozen=True)
class UnitFigures:
    """What a rank measured. Bytes and seconds; `seconds` of one step's actions with the layer, by their kind.

    `longest`: of what was computed without a pause, a layer or the head for one micro-batch or an update, and its name;
    `tflops`: executed in the layer's forward and backward; `memory_rate`: bytes per second; `late_bytes`: what MLX may
    give back late, beside what is planned.
    """

    host: str
    chip: str | None
    peak_bytes: int
    predicted_peak_bytes: int
    seconds: dict[str, float]
    longest: str
    longest_seconds: float
    tflops: float
    memory_rate: float
    late_bytes: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    parser = UserArguments(prog="python -m mlx_empire.run.unit", description="One true layer over all ranks.")
    parser.add_argument("recipe", type=Path, help="the YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as memory.zero_stage=2")
    parser.add_argument("--hosts", type=Path, help="the hostfile, where mpirun's own cannot be found")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="what was measured, as JSON")
    with guard(None):
        comm = connect()
    with guard(comm):
        options = parser.parse_intermixed_args(arguments)
        recipe = share_recipe(comm, options.recipe, options.overrides)
        with together(comm):
            if comm.rank == 0:
                refuse_source("--out", options.out, [options.recipe, options.hosts])
        comm = connect(recipe.comm.route, recipe.comm.bucket_bytes, recipe.comm.deadline_seconds)
        train_layer(comm, recipe, options.hosts, options.out)
    return 0


def train_layer(comm: Communicator, recipe: Recipe, hosts: Path | None, out: Path) -> None:
    """Train the layer, write `out` and say what was found. Collective. DoesNotFitError for a peak above its plan."""
    nodes = share_nodes(comm, recipe, hosts)
    recipe, target, layer = one_layer(comm, recipe, nodes)
    with together(comm):
        if mx.metal.is_available() and computes_on_gpu():
            refuse_too_short(recipe.data.sequence_length)
        plan = fitting_plan(recipe, target.spec, nodes, state_bytes_of(recipe.optimizer))
        limit_memory(plan, comm.rank, recipe.memory.wired, nodes[comm.rank])
    with explaining_memory(plan, comm.rank):
        own = trained(comm, recipe, target, plan, layer, nodes[comm.rank])
    figures = [UnitFigures(**fields) for fields in comm.gather_json(asdict(own))]
    name = target.spec.units[layer].name
    with together(comm):
        if comm.rank == 0:
            document = {
                "model": target.spec.name,
                "dtype": target.spec.dtype,
                "layer": name,
                "zero_stage": plan.shards.zero_stage,
                "ranks": [asdict(one) for one in figures],
            }
            write(out, document)
            print("\n".join(lines_of(figures, name)), flush=True)
    if above := above_plan(figures):
        raise on_all_ranks(DoesNotFitError(f"{name}: {above}"))


def one_layer(comm: Communicator, recipe: Recipe, nodes: Sequence[Node]) -> tuple[Recipe, Target, int]:
    """What is trained in the place of the whole model, and which unit of it is looked at. Collective."""
    alone = {"model.init": "random", "model.base_digest": None, "distillation.teacher": None}
    recipe = variant(recipe, alone)
    config = share_config(comm, recipe)
    whole = share_target(comm, recipe, config)
    plan = resolve(recipe, whole.spec, nodes, state_bytes_of(recipe.optimizer))
    layer = largest_layer(whole.spec)
    ranks, adds = len(nodes), plan.work.layout.micro_batches > plan.work.layout.cells
    changes = {
        "memory.zero_stage": plan.shards.zero_stage,
        "memory.gradient_dtype": plan.work.gradient_dtype,
        "memory.gradient_checkpointing": True,
        "batch.global_size": recipe.batch.micro_size * ranks * (2 if adds else 1),
        "batch.cells": ranks,
    }
    recipe = variant(recipe, changes)
    return recipe, share_target(comm, recipe, first_layers(config, layer)), layer


def largest_layer(spec: ModelSpec) -> int:
    """The first unit, counted from the root's 0, of those layers that have most parameters."""
    sizes = [sum(tensor.parameters for tensor in unit.tensors) for unit in spec.units[1:]]
    return 1 + sizes.index(max(sizes))


def trained(
    comm: Communicator, recipe: Recipe, target: Target, plan: RunPlan, layer: int, node: Node
) -> UnitFigures:
    """Train the steps; this rank's figures. Collective."""
    rate = measured_memory_rate()
    with CommThread() as thread:
        trainer = make_trainer(comm, thread, recipe, target, plan)
        load_weights(comm, recipe, target, trainer.store)
        trainer.prepare(packing=recipe.data.packing)
        own = [drawn(recipe, target.spec, j) for cell in plan.work.layout.of_rank(comm.rank) for j in cell]
        total = recipe.batch.global_size * recipe.data.sequence_length
        mx.reset_peak_memory()
        for step in range(1, STEPS + 1):
            trace = StepTrace(comm.rank)
            trainer.observe(trace)
            trainer.train_step(own, total, step, recipe.optimizer.learning_rate)
        trainer.observe(None)
        peak = mx.get_peak_memory() + comm.staging_bytes
    seconds = {part: spent(trace.events, kinds, layer) for part, kinds in PARTS.items()}
    longest = max((e for e in trace.events if e.lane == COMPUTE), key=lambda e: e.end - e.start)
    operations = unit_flops(target.spec, plan.work)[layer]
    flops = (operations.forward + operations.backward) * plan.work.tokens * len(own)
    return UnitFigures(
        host=node.name,
        chip=node.chip,
        peak_bytes=peak,
        predicted_peak_bytes=plan.ledgers[comm.rank].peak,
        seconds=seconds,
        longest=f"{longest.what} of {target.spec.units[longest.unit].name if longest.unit >= 0 else 'all'}",
        longest_seconds=longest.end - longest.start,
        tflops=flops / max(seconds["forward"] + seconds["backward"], 1e-9) / 1e12,
        memory_rate=rate,
        late_bytes=plan.ledgers[comm.rank].items().get("optimizer chunk", 0),
    )


def spent(events: Iterable[Event], kinds: Sequence[str], unit: int) -> float:
    """Seconds of actions of these kinds with a unit, waiting left out."""
    own = (event for event in events if event.what in kinds and event.unit == unit)
    return sum(event.end - event.start for event in own if event.lane in (COMPUTE, EXCHANGE))


def drawn(recipe: Recipe, spec: ModelSpec, micro: int) -> MicroBatch:
    """Whole rows of tokens at random, each one document; all of them count."""
    rows, width = recipe.batch.micro_size, recipe.data.sequence_length
    vocabulary = int(spec.text_config["vocab_size"])
    tokens = np.random.default_rng(micro).integers(0, vocabulary, (rows, width + 1)).astype(np.int32)
    documents = np.zeros((rows, width), np.int32) if recipe.data.packing else None
    mask = np.ones((rows, width), np.float32)
    return MicroBatch(tokens[:, :-1], tokens[:, 1:], mask, documents, tuple(range(rows)))


def above_plan(figures: Sequence[UnitFigures]) -> str:
    """Where a peak is above its plan, in words; empty where none is."""
    above = [
        f"{one.host} (rank {rank}) needed {amount(one.peak_bytes)} where the plan says "
        f"{amount(one.predicted_peak_bytes)}"
        for rank, one in enumerate(figures)
        if one.peak_bytes > (1 + KNOWN_UNDER) * one.predicted_peak_bytes + one.late_bytes
    ]
    said = "; ".join(above)
    return f"{said}: plans for these machines are too low, so nothing is planned with them" if above else ""


def calibration_from(path: Path, spec: ModelSpec) -> Calibration:
    """The first rank's speed out of a file of `main`. DoesNotFitError where a peak in it is above its plan.

    UserError for a file that is none, or of another model or dtype.
    """
    try:
        document = json.loads(read_small_text(path, "measurements", MOST_FILE_BYTES, REMEDY))
        figures = [UnitFigures(**fields) for fields in document["ranks"]]
        measured, layer = (document["model"], document["dtype"]), document["layer"]
        first = figures[0]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"--unit: {path}: {error!r}; {REMEDY}") from None
    if measured != (spec.name, spec.dtype):
        raise UserError(
            f"--unit: {path}: is of {' in '.join(measured)}, not of {spec.name} in {spec.dtype}; {REMEDY}"
        )
    if above := above_plan(figures):
        raise DoesNotFitError(f"{layer}: {above}")
    return Calibration(first.host, first.chip, spec.dtype, first.tflops, first.memory_rate)


def lines_of(figures: Sequence[UnitFigures], layer: str) -> list[str]:
    """What was measured, a line for each rank."""
    return [
        f"{one.host}: {layer}: peak {amount(one.peak_bytes)} of {amount(one.predicted_peak_bytes)} planned; "
        + ", ".join(f"{part} {seconds:.3f} s" for part, seconds in one.seconds.items())
        + f"; longest: {one.longest}, {one.longest_seconds:.3f} s; {one.tflops:.3f} TFLOP/s"
        for one in figures
    ]


def write(out: Path, document: dict[str, Any]) -> None:
    """UserError where the file cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_private(out, json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--out: {out}: {error.strerror}; choose a file that can be written") from None


if __name__ == "__main__":
    sys.exit(main())
