"""Adapters for tests: our trainer of a tuned tiny model, and an independent reference of mlx-lm's own layers.

The reference is mlx-lm's model with its own adapter layers on a frozen base, trained as a whole: gradients by
`nn.value_and_grad`, one micro-batch at a time, and a textbook AdamW in float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.trainer import Trainer, TrainerSettings
from mlx_empire.formats.source import TunedSource, WeightSource
from mlx_empire.model.build import build_model
from mlx_empire.model.closed_forms import root_use
from mlx_empire.model.spec import ModelSpec, TensorSpec
from mlx_empire.model.target import Target, make_target
from mlx_empire.optim.adamw import AdamW
from mlx_empire.plan.shards import make_plan
from mlx_empire.plan.workload import Workload, cell_layout
from mlx_empire.recipe.sections import TuningSection
from support.references import RowLosses, reference_loss, stock_losses
from support.stepping import Case, batches_of, config_of, counted_tokens, inputs_of, keeping, weights_of

SEED = 11
ATTENTION = tuple(f"self_attn.{p}_proj" for p in "qkvo")
# What "all-linear" must mean, written down by hand: every linear layer but routers and stacked experts.
LINEAR = {
    "llama": (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "qwen3_moe": ATTENTION,
    "llama4": (*ATTENTION, *(f"feed_forward.shared_expert.{p}_proj" for p in ("gate", "up", "down"))),
}
ROOT = {"embed_tokens", "lm_head"}
EXPERTS = {
    "qwen3_moe": tuple(f"mlp.switch_mlp.{p}_proj" for p in ("gate", "up", "down")),
    "llama4": tuple(f"feed_forward.experts.{p}_proj" for p in ("gate", "up", "down")),
}


@dataclass(frozen=True)
class TunedCase(Case):
    """A case with a `tuning` section, as written in a recipe; `qat_warmup`: steps of ternary weights' warm-up."""

    tuning: dict[str, Any] = field(default_factory=lambda: {"type": "lora"})
    qat_warmup: int = 0

    def strength(self, step: int) -> float:
        """Of rounding in a step, counted from 0: it rises in equal parts from the first step on."""
        return min(1.0, step / self.qat_warmup) if self.qat_warmup else 1.0


class HeldWeights:
    """A source of weights that are at hand."""

    def __init__(self, spec: ModelSpec, values: dict[str, mx.array]) -> None:
        self._spec, self._values = spec, values

    def unit(self, index: int) -> Iterator[tuple[TensorSpec, mx.array]]:
        for tensor in self._spec.units[index].tensors:
            yield tensor, self._values[tensor.name].astype(getattr(mx, tensor.dtype))


def built_of(case: TunedCase) -> Target:
    """The tuned model of a case."""
    tuning = TuningSection.model_validate(case.tuning)
    return make_target(config_of(case), tuning, case.family, case.dtype)


def tuned_trainer(
    case: TunedCase,
    comm: Communicator,
    thread: CommThread,
    given: tuple[Target, WeightSource] | None = None,
) -> Trainer:
    """Our trainer for the case on this world, loaded and prepared; `given`: another model and its base's weights."""
    built, base = given or (built_of(case), None)
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
        by_pattern=case.by_pattern,
        run_ahead=case.run_ahead,
        wave=case.wave,
        compiled=case.compiled,
        paged=False,
        offload=case.offload,
        embeds=root_use(built.spec)[1] > 0,
    )
    plan = make_plan(built.spec.units, shares, case.stage)
    work = keeping(work, built.spec, plan, case.kept)
    optimizer = AdamW(weight_decay=case.weight_decay, state_bits=case.state_bits)
    noise = SEED if case.tuning.get("dropout") else None
    settings = TrainerSettings(case.clip_norm, noise)
    inputs = inputs_of(built.spec, plan, work, comm.rank)
    trainer = Trainer(built.model, built.spec, plan, work, comm, thread, optimizer, settings, inputs)
    source: WeightSource = base or HeldWeights(built.base, weights_of(case)[2])
    if built.adapters is not None or built.ternary:
        source = TunedSource(source, built.spec, SEED, built.packing)
    for index in range(len(built.spec.units)):
        trainer.store.load(index, source.unit(index))
    trainer.prepare(packing=case.packed)
    return trainer


# ---- the reference


def reference_model(case: TunedCase, *, layers: int = 4) -> nn.Module:
    """mlx-lm's model with the case's weights, a base quantised by `nn.quantize` for qlora, and mlx-lm's adapters."""
    # Imports transformers, so only where there is a reference.
    from mlx_lm.tuner.utils import linear_to_lora_layers

    _, _, values = weights_of(case)
    model = build_model(config_of(case), case.family)
    model.load_weights(list(values.items()))
    tuning = case.tuning
    if tuning.get("bits") == "ternary":
        model.load_weights(
            [(n, ternary_values(a)) for n, a in values.items() if is_ternary(n, a)], strict=False
        )
    elif tuning["type"] == "qlora":
        bits = tuning.get("bits", 4)
        group = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}.get(bits, 64)
        nn.quantize(
            model,
            None if isinstance(bits, str) else group,
            None if isinstance(bits, str) else bits,
            mode=bits if isinstance(bits, str) else "affine",
            class_predicate=lambda path, module: (
                hasattr(module, "to_quantized")
                and module.weight.shape[-1] % group == 0
                and not path.endswith((".gate", ".router"))
            ),
        )
    model.freeze()
    keys = [*LINEAR[case.family]] if tuning.get("targets") != ["lm_head"] else []
    root = [
        f"{'model.' if name == 'embed_tokens' else ''}{name}" for name in ROOT & {*tuning.get("targets", ())}
    ]
    keys += root if root or "targets" not in tuning else EXPERTS[case.family]
    rank = tuning.get("rank", 8)
    model.train()
    settings = {
        "rank": rank,
        "scale": tuning.get("alpha", 2 * rank) / rank,
        "dropout": tuning.get("dropout", 0.0),
        "keys": keys,
    }
    linear_to_lora_layers(model, tuning.get("layers", layers), settings, use_dora=tuning["type"] == "dora")
    return model


def is_ternary(name: str, array: mx.array) -> bool:
    """Which weights a ternary base packs, written down by hand: matrices of layers but routers."""
    plain = (
        ".layers." in name
        and name.endswith(".weight")
        and not name.endswith((".gate.weight", ".router.weight"))
    )
    return plain and array.ndim >= 2 and array.shape[-1] % 64 == 0


def ternary_values(array: mx.array) -> mx.array:
    """What a float32 matrix becomes: in each group of 64 inputs -s, 0 or +s, with s the mean absolute value."""
    values = np.array(array)
    for group in values.reshape(-1, 64):  # a view
        s = np.abs(group).mean(dtype=np.float64).astype(np.float32)
        group[:] = np.where(np.abs(group) > 0.5 * s, np.sign(group) * s, 0)
    return mx.array(values)


class _Seeded(nn.Module):
    """A layer before whose call MLX's generator is seeded as DESIGN says: by seed, step, micro-batch and layer."""

    now = (0, 0)

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        self.layer, self._index = layer, index

    def __getattr__(self, name: str) -> Any:
        if name in self or "layer" not in self:
            return super().__getattr__(name)
        return getattr(self["layer"], name)

    def __call__(self, *arguments: Any, **keywords: Any) -> mx.array:
        key = f"{SEED}:{self.now[0]}:{self.now[1]}:{self._index}"
        mx.random.seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
        return self.layer(*arguments, **keywords)


def seeded(model: nn.Module) -> nn.Module:
    """`model` with dropout masks of its own for each step, micro-batch and layer; names get a `.layer`."""
    model.model.layers = [_Seeded(layer, i) for i, layer in enumerate(model.model.layers)]
    return model


def trainable(model: nn.Module) -> dict[str, np.ndarray]:
    """The adapters by name, in float64."""
    return {name: np.array(a).astype(np.float64) for name, a in tree_flatten(model.trainable_parameters())}


def norms_of(
    gradients: dict[str, np.ndarray], case: TunedCase, last: float
) -> tuple[dict[str, float], float]:
    """By which norm each tensor is clipped, and that of all: with gradient release the larger one of the last step's
    and of the layers so far, the last layer first and the root last."""
    squares = {name: float((g**2).sum()) for name, g in gradients.items()}
    norm = np.sqrt(sum(squares.values()))
    if not case.release:
        return dict.fromkeys(gradients, norm), norm
    layer = {
        name: int(name.split("layers.")[1].split(".")[0]) if "layers." in name else -1 for name in gradients
    }
    so_far = {
        n: np.sqrt(sum(own for other, own in squares.items() if layer[other] >= layer[n])) for n in layer
    }
    return {name: max(last, found) for name, found in so_far.items()}, norm


def textbook_steps(
    case: TunedCase, model: nn.Module, steps: int, by_row: RowLosses = stock_losses
) -> list[float]:
    """Train `model` in place: whole-model gradients, clipped by their norm, AdamW in float64. Returns the losses."""
    weights = trainable(model)
    m = {name: np.zeros_like(w) for name, w in weights.items()}
    v = {name: np.zeros_like(w) for name, w in weights.items()}
    gradient, losses = nn.value_and_grad(model, reference_loss), []
    last = 0.0
    for step in range(steps):
        batches = batches_of(case, step)
        total, loss, sums = counted_tokens(batches), 0.0, {name: 0.0 for name in weights}
        for j, batch in enumerate(batches):
            _Seeded.now = (step + 1, j)
            one, gradients = gradient(model, batch, total, by_row)
            loss += one.item()
            for name, g in tree_flatten(gradients):
                sums[name] = sums[name] + np.array(g).astype(np.float64)
        norms, norm = norms_of(sums, case, last)
        last = norm
        for name, w in weights.items():
            g = sums[name] * (min(1.0, case.clip_norm / norms[name]) if case.clip_norm else 1.0)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            update = m[name] / (1 - 0.9 ** (step + 1)) / (np.sqrt(v[name] / (1 - 0.999 ** (step + 1))) + 1e-8)
            decay = case.weight_decay * w if w.ndim > 1 else 0.0
            weights[name] = w - case.learning_rate * (update + decay)
        model.load_weights([(n, mx.array(w.astype(np.float32))) for n, w in weights.items()], strict=False)
        losses.append(loss)
    return losses
