"""What a way of tuning does to a model, as tensors: adapters are added, the base is frozen and perhaps quantised.

Decides which matrices get adapters and the shapes of these, so that the same ShardPlan and ledger serve full
fine-tuning and every kind of adapter. Conventions and names are mlx-lm's: what gets an adapter is nested as `linear`
(an embedding as `embedding`); `lora_a` (inputs, rank) and `lora_b` (rank, outputs) are fp32, for stacked experts
(experts, rank, inputs) and (experts, outputs, rank); an embedding's inputs are the vocabulary. DoRA has a magnitude
`m` per output. How a base is packed stands in packing.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

from mlx_empire.plan.counts import experts, is_stacked
from mlx_empire.plan.model import ModelSpec, TensorSpec, UnitSpec, is_embedding, is_router
from mlx_empire.plan.packing import Choice, Packing, packing_of, uniformly
from mlx_empire.recipe.sections import TuningSection

DEFAULT_RANK = 8
EXPERTS = "experts"  # the target that stands for the stacked matrices of a mixture's experts
ALL_LINEAR = (
    "all-linear"  # the target that stands for every linear module of the layers but routers and experts
)


def tuned(spec: ModelSpec, tuning: TuningSection, stored: Choice | None = None) -> ModelSpec:
    """`spec` after tuning: itself for full fine-tuning, else with a frozen base and adapters.

    `stored`: how the folder's weights are packed already.
    """
    if tuning.type == "full":
        return spec
    choose = stored or uniformly(packing_of(tuning))
    total, _ = experts(spec.text_config)
    first = len(spec.units) - (tuning.layers or len(spec.units) - 1)
    units = []
    for index, unit in enumerate(spec.units):
        tensors: list[TensorSpec] = []
        own = "" if index == 0 else f"{unit.name}."  # targets are looked for inside a layer
        adapted = {
            t.name.removesuffix(".weight")
            for t in unit.tensors
            if (index == 0 or index >= first)
            and _gets_adapter(t, t.name.removeprefix(own), targets_of(tuning), total, root=index == 0)
        }
        for stem, module in groupby(unit.tensors, lambda t: t.name.rpartition(".")[0]):
            inner = "embedding" if index == 0 and is_embedding(stem) else "linear"
            for tensor in (members := list(module)):
                packing = choose(tensor, index == 0) if _is_matrix(tensor) else None
                tensors += _base(_nested(tensor, inner) if stem in adapted else tensor, packing)
            if stem in adapted:
                matrix = next(t for t in members if _is_matrix(t))
                tensors += _adapters(matrix, tuning, embedding=inner == "embedding")
        units.append(UnitSpec(unit.name, tuple(tensors)))
    return replace(spec, units=tuple(units))


def targets_of(tuning: TuningSection) -> tuple[str, ...]:
    """What the recipe asks adapters for."""
    if tuning.targets is None or isinstance(tuning.targets, str):
        return (ALL_LINEAR,)
    return tuning.targets


def is_target(module: str, target: str) -> bool:
    """Whether `target` names `module` (both as paths inside a layer): the whole path or its last parts."""
    return module == target or module.endswith("." + target)


def _nested(tensor: TensorSpec, inner: str) -> TensorSpec:
    stem, _, leaf = tensor.name.rpartition(".")
    return replace(tensor, name=f"{stem}.{inner}.{leaf}")


def _base(tensor: TensorSpec, packing: Packing | None) -> Iterator[TensorSpec]:
    if packing:
        yield from packing.tensors(tensor)
    else:
        yield replace(tensor, trainable=False)


def _gets_adapter(
    tensor: TensorSpec, inner_name: str, targets: tuple[str, ...], total_experts: int, *, root: bool
) -> bool:
    if not _is_matrix(tensor) or is_router(tensor.name):
        return False
    if not root and is_stacked(tensor, total_experts):
        return EXPERTS in targets
    if len(tensor.shape) != 2:  # the kernel of a convolution
        return False
    if ALL_LINEAR in targets and not root:
        return True
    return any(is_target(inner_name.removesuffix(".weight"), t) for t in targets)


def _adapters(tensor: TensorSpec, tuning: TuningSection, *, embedding: bool) -> Iterator[TensorSpec]:
    *stack, outputs, inputs = tensor.shape
    if embedding:
        outputs, inputs = inputs, outputs
    rank = tuning.rank or DEFAULT_RANK
    stem = tensor.name.removesuffix(".weight")
    if tuning.type == "dora":
        yield TensorSpec(f"{stem}.m", (outputs,), "float32")
    yield TensorSpec(f"{stem}.lora_a", (*stack, rank, inputs) if stack else (inputs, rank), "float32")
    yield TensorSpec(f"{stem}.lora_b", (*stack, outputs, rank) if stack else (rank, outputs), "float32")


def _is_matrix(tensor: TensorSpec) -> bool:
    return len(tensor.shape) >= 2 and tensor.name.endswith(".weight")
