"""What a way of tuning does to a model, as tensors: adapters are added, the base is frozen and perhaps quantised.

Decides which matrices get adapters and which are quantised, and the shapes of both, so that the same ShardPlan and
ledger serve full fine-tuning and every kind of adapter. Conventions and names are mlx-lm's: what gets an adapter is
nested as `linear`; `lora_a` (inputs, rank) and `lora_b` (rank, outputs) are fp32, for stacked experts (experts, rank,
inputs) and (experts, outputs, rank); DoRA has a magnitude `m` per output. A quantised matrix is `weight` (packed in
uint32), `scales` and `biases`, one of each per group of 64 inputs; a ternary base is kept in 2-bit codes, so that the
stock kernels run it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

from mlx_empire.plan.counts import experts, is_stacked
from mlx_empire.plan.model import QUANTISED_GROUP, ModelSpec, TensorSpec, UnitSpec, is_router
from mlx_empire.recipe.schema import TuningSection

DEFAULT_RANK = 8
DEFAULT_BITS = 4
TERNARY_BITS = 2  # what codes of three values are stored in
EXPERTS = "experts"  # the target that stands for the stacked matrices of a mixture's experts


def tuned(spec: ModelSpec, tuning: TuningSection) -> ModelSpec:
    """`spec` after tuning: itself for full fine-tuning, else with a frozen base and adapters."""
    if tuning.type == "full":
        return spec
    total, _ = experts(spec.text_config)
    first = len(spec.units) - (tuning.layers or len(spec.units) - 1)
    units = []
    for index, unit in enumerate(spec.units):
        tensors: list[TensorSpec] = []
        own = f"{unit.name}."  # targets are looked for inside a layer
        adapted = {
            t.name.removesuffix(".weight")
            for t in unit.tensors
            if index >= max(first, 1) and _gets_adapter(t, t.name.removeprefix(own), tuning, total)
        }
        for stem, module in groupby(unit.tensors, lambda t: t.name.rpartition(".")[0]):
            for tensor in (members := list(module)):
                tensors += _base(_nested(tensor) if stem in adapted else tensor, tuning)
            if stem in adapted:
                tensors += _adapters(next(t for t in members if _is_matrix(t)), tuning)
        units.append(UnitSpec(unit.name, tuple(tensors)))
    return replace(spec, units=tuple(units))


def base_bits(tuning: TuningSection) -> int | None:
    """Bits per weight of a quantised base; None where it stays as it is."""
    if tuning.type != "qlora":
        return None
    return TERNARY_BITS if tuning.bits == "ternary" else int(tuning.bits or DEFAULT_BITS)


def is_target(module: str, target: str) -> bool:
    """Whether `target` names `module` (both as paths inside a layer): the whole path or its last parts."""
    return module == target or module.endswith("." + target)


def _nested(tensor: TensorSpec) -> TensorSpec:
    stem, _, leaf = tensor.name.rpartition(".")
    return replace(tensor, name=f"{stem}.linear.{leaf}")


def _base(tensor: TensorSpec, tuning: TuningSection) -> Iterator[TensorSpec]:
    bits = base_bits(tuning)
    if bits is None or not _is_matrix(tensor) or tensor.shape[-1] % QUANTISED_GROUP or is_router(tensor.name):
        yield replace(tensor, trainable=False)
        return
    *rows, inputs = tensor.shape
    stem = tensor.name.removesuffix(".weight")
    yield TensorSpec(tensor.name, (*rows, inputs * bits // 32), "uint32", False)
    for part in ("scales", "biases"):
        yield TensorSpec(f"{stem}.{part}", (*rows, inputs // QUANTISED_GROUP), tensor.dtype, False)


def _gets_adapter(tensor: TensorSpec, inner_name: str, tuning: TuningSection, total_experts: int) -> bool:
    if not _is_matrix(tensor) or is_router(tensor.name):
        return False
    targets = tuning.targets or "all-linear"
    if is_stacked(tensor, total_experts):
        return targets != "all-linear" and EXPERTS in targets
    if len(tensor.shape) != 2:  # the kernel of a convolution
        return False
    return targets == "all-linear" or any(is_target(inner_name.removesuffix(".weight"), t) for t in targets)


def _adapters(tensor: TensorSpec, tuning: TuningSection) -> Iterator[TensorSpec]:
    *stack, outputs, inputs = tensor.shape
    rank = tuning.rank or DEFAULT_RANK
    stem = tensor.name.removesuffix(".weight")
    if tuning.type == "dora":
        yield TensorSpec(f"{stem}.m", (outputs,), "float32")
    yield TensorSpec(f"{stem}.lora_a", (*stack, rank, inputs) if stack else (inputs, rank), "float32")
    yield TensorSpec(f"{stem}.lora_b", (*stack, outputs, rank) if stack else (rank, outputs), "float32")


def _is_matrix(tensor: TensorSpec) -> bool:
    return len(tensor.shape) >= 2 and tensor.name.endswith(".weight")
