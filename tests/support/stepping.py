"""Training steps of tiny models for tests: a case in numbers, our trainer for it, and an independent reference.

The reference runs the whole model under `nn.value_and_grad`, one micro-batch at a time, and adds gradients in the
order of DESIGN's cells: micro-batches within a cell, then cells. A tied matrix is given to it as two tensors, so that
head and embedding are summed apart, as a streamed step does.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_empire.comm.buffers import host_view
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.data.batches import MicroBatch, Teacher
from mlx_empire.engine.input_file import InputFile
from mlx_empire.engine.loss_scale import LossScale
from mlx_empire.engine.trainer import Trainer, TrainerSettings
from mlx_empire.model.build import build_model, describe
from mlx_empire.model.distillation import Distillation
from mlx_empire.model.spec import ModelSpec
from mlx_empire.optim.choose import make_optimizer
from mlx_empire.optim.flat import FlatOptimizer
from mlx_empire.plan.actions import Stash
from mlx_empire.plan.activations import hidden_bytes
from mlx_empire.plan.kept import order_of
from mlx_empire.plan.offload import file_places
from mlx_empire.plan.shards import ShardPlan, make_plan
from mlx_empire.plan.workload import Workload, cell_layout, step_shape
from mlx_empire.recipe.update_sections import OptimizerSection
from support.tiny_models import tiny_config

VOCABULARY = 256
TAUGHT = Distillation(weight=0.7, temperature=1.7, top=5)
VARIED = (8, 1, 4, 2)  # documents of a row, where they are to vary


@dataclass(frozen=True)
class Case:
    """One setting. `shares` has one weight per rank and is cut or repeated to the world's size. `documents` of a packed
    row; 0: of each micro-batch others, in its first of step 1 a single one. `kept`: the part of what recomputed layers
    could keep that they do."""

    family: str = "llama"
    shares: tuple[float, ...] = (1.0,)
    stage: int = 3
    cells: int | str = "auto"
    tail: int = 0
    tied: bool = False
    micro_batches: int = 6
    rows: int = 2
    width: int = 32
    packed: bool = False
    documents: int = 2
    by_pattern: bool = False
    dtype: str = "float32"
    clip_norm: float | None = 1.0
    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    state_bits: int = 32
    optimizer: str = "adamw"
    master_weights: str = "exact"
    gradient_dtype: str = "float32"
    release: bool = False
    steps: int = 1
    route: str = "auto"
    run_ahead: bool = False
    strict: bool = True
    compiled: bool = False
    kept: float = 0.0
    wave: int = 0
    offload: bool = False
    loss_scale: float = 1.0
    scale_window: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    taught: bool = False

    @property
    def distillation(self) -> Distillation | None:
        """How the teacher's values of `batches_of` count."""
        return TAUGHT if self.taught else None


def config_of(case: Case) -> dict[str, Any]:
    """The tiny configuration of a case."""
    tied = {} if case.family in ("llama4", "gemma2", "gpt2") else {"tie_word_embeddings": case.tied}
    return tiny_config(case.family, **tied, **case.config)


def weights_of(case: Case) -> tuple[nn.Module, ModelSpec, dict[str, mx.array]]:
    """The randomly initialised model, its description and its weights by name."""
    config = config_of(case)
    mx.random.seed(7)
    model = build_model(config, case.family)
    model.apply(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a)
    spec = describe(model, config, case.family, case.dtype)
    values = dict(tree_flatten(model.parameters()))
    mx.eval(values)
    return model, spec, values


def batches_of(case: Case, step: int = 0) -> list[MicroBatch]:
    """All micro-batches of a step: unequal numbers of counted tokens, some rows with none at the start."""
    rng = np.random.default_rng(100 + step)
    made = []
    for j in range(case.micro_batches):
        tokens = rng.integers(0, VOCABULARY, (case.rows, case.width + 1)).astype(np.int32)
        mask = np.ones((case.rows, case.width), np.float32)
        mask[0, : (5 * j) % case.width] = 0
        documents = None
        if case.packed:
            place, cut = np.arange(case.width), 5 + 3 * (j % 4)
            count = case.documents or VARIED[(step + j) % len(VARIED)]
            starts = (
                [cut, *(cut + n * case.width // (count - 1) for n in range(1, count - 1))]
                if count > 1
                else []
            )
            row = np.searchsorted(starts, place, side="right").astype(np.int32)
            documents = np.repeat(row[None], case.rows, 0)
        teacher = random_teacher(rng, (case.rows, case.width)) if case.taught else None
        made.append(
            MicroBatch(tokens[:, :-1], tokens[:, 1:], mask, documents, tuple(range(case.rows)), teacher)
        )
    return made


def random_teacher(rng: np.random.Generator, shape: tuple[int, int]) -> Teacher:
    """A teacher that knows nothing: other tokens at each position, and probabilities that add up to one."""
    ids = np.argsort(rng.random((*shape, VOCABULARY)), axis=-1)[..., : TAUGHT.top].astype(np.int32)
    logs = np.log(rng.dirichlet(np.ones(TAUGHT.top + 1), shape)).astype(np.float16)
    return lambda: (ids, logs)


def counted_tokens(batches: list[MicroBatch]) -> int:
    """The step's global count."""
    return int(sum(b.mask.sum() for b in batches))


def trainer_of(case: Case, comm: Communicator, thread: CommThread, **settings: Any) -> Trainer:
    """Our trainer for the case on this world, loaded and prepared."""
    model, spec, values = weights_of(case)
    shares = [case.shares[r % len(case.shares)] for r in range(comm.size)]
    layout = cell_layout(case.micro_batches * case.rows, case.rows, case.cells, comm.size)
    work = Workload(
        case.rows,
        case.width,
        layout,
        case.tail,
        case.gradient_dtype,
        case.route,
        8192,
        case.release,
        by_pattern=case.by_pattern,
        strict=case.strict,
        run_ahead=case.run_ahead,
        wave=case.wave,
        compiled=case.compiled,
        paged=False,
        distillation=case.distillation,
        offload=case.offload,
    )
    plan = make_plan(spec.units, shares, case.stage)
    work = keeping(work, spec, plan, case.kept)
    optimizer = optimizer_of(case)
    settings.setdefault("loss_scale", LossScale(case.loss_scale, case.scale_window))
    chosen = TrainerSettings(case.clip_norm, **settings)
    inputs = inputs_of(spec, plan, work, comm.rank)
    trainer = Trainer(model, spec, plan, work, comm, thread, optimizer, chosen, inputs)
    for index, unit in enumerate(spec.units):
        trainer.store.load(index, ((t, values[t.name]) for t in unit.tensors))
    trainer.prepare(packing=case.packed)
    return trainer


def inputs_of(spec: ModelSpec, plan: ShardPlan, work: Workload, rank: int) -> InputFile | None:
    """A file for what the work offloads, with no more places than the plan says."""
    count = file_places(step_shape(plan, work, rank))
    return InputFile(Path(tempfile.gettempdir()), count, hidden_bytes(spec, work)) if count else None


def keeping(work: Workload, spec: ModelSpec, plan: ShardPlan, part: float) -> Workload:
    """`work` with a part of what each rank could keep of recomputed layers."""
    order = order_of(spec, work, plan.trained, least=0) if part else ()
    visits = (round(part * len(order) * work.micro_batches(rank)) for rank in range(plan.world_size))
    return replace(work, stashes=tuple(Stash(order, n) for n in visits))


def optimizer_of(case: Case) -> FlatOptimizer:
    """The case's optimizer, as a recipe would ask for it."""
    section = OptimizerSection(
        name=case.optimizer,
        learning_rate=case.learning_rate,
        weight_decay=case.weight_decay,
        state_bits=case.state_bits,
        master_weights=case.master_weights,
    )
    return make_optimizer(section)


def own_batches(trainer: Trainer, batches: list[MicroBatch], rank: int) -> list[MicroBatch]:
    """The micro-batches of a rank, in the order of its cells."""
    return [batches[j] for cell in trainer.work.layout.of_rank(rank) for j in cell]


def gathered_gradients(trainer: Trainer, comm: Communicator) -> dict[str, np.ndarray]:
    """The finished gradient of every tensor, put together from all ranks' intervals, flat fp32."""
    plan, found = trainer.store.plan, {}
    whole: dict[tuple[int, int], np.ndarray] = {}
    for unit in plan.units:
        for s, segment in enumerate(unit.segments):
            total = host_view(trainer.gradients.totals[unit.index][s].astype(mx.float32))
            if plan.zero_stage == 0:
                a, b = segment.interval(comm.rank)
                total = total[a:b]
            whole[unit.index, s] = np.concatenate(comm.gather_arrays(total))
    for name, (u, s, p) in plan.tensors.items():
        found[name] = whole[u, s][p.start : p.start + p.tensor.size]
    return found


def whole_weights(trainer: Trainer) -> dict[str, np.ndarray]:
    """Every tensor in its compute dtype (bfloat16 as uint16), flat."""
    found = {}
    for unit in trainer.store.plan.units:
        trainer.store.bind(unit.index)
        for name, array in trainer.store.tensors(unit.index).items():
            found[name] = host_view(mx.contiguous(array)).copy()
        trainer.store.free(unit.index)
    return found


def rounded_to_bf16(values: np.ndarray, ties_to_even: bool) -> np.ndarray:
    """fp32 -> bf16 bits (uint16); MLX casts with ties to even, masters are split with ties away."""
    bits = values.astype(np.float32).view(np.uint32)
    bump = np.uint32(0x7FFF) + ((bits >> 16) & 1) if ties_to_even else np.uint32(0x8000)
    return ((bits + bump) >> 16).astype(np.uint16)


def as_fp32(bits: np.ndarray) -> np.ndarray:
    """bf16 bits (uint16) -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def digest(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 over names and bytes."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        sha.update(name.encode())
        sha.update(np.ascontiguousarray(arrays[name]).tobytes())
    return sha.hexdigest()[:24]


# ---- the reference
