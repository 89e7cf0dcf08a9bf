"""Ternary training as the papers write it, in numpy's float64: rounding, straight-through gradients, AdamW.

Nothing here is the trainer's: a matrix is cut into groups by hand, codes and scales follow from the definition, and the
chain rule is written out. Only the gradient by the weights that are *used* comes from mlx-lm's plain model as a whole.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from support.references import reference_loss
from support.stepping import batches_of, config_of, counted_tokens, weights_of
from support.tuning import TunedCase

from mlx_empire.model.build import build_model

Arrays = dict[str, np.ndarray]


def is_ternary(name: str, array: np.ndarray) -> bool:
    """Which weights of a llama are rounded: matrices of layers with whole groups of 64 inputs."""
    return ".layers." in name and array.ndim == 2 and array.shape[1] % 64 == 0


def groups_of(weight: np.ndarray, group: int | str) -> np.ndarray:
    """(rows, groups of a row, group): a matrix that has one scale is one group of one row."""
    return weight.reshape(1, 1, -1) if group == "matrix" else weight.reshape(len(weight), -1, 64)


def codes_and_means(weight: np.ndarray, group: int | str) -> tuple[np.ndarray, np.ndarray]:
    """c of each weight, by groups, and the mean absolute value of each group."""
    groups = groups_of(weight, group)
    means = np.abs(groups).mean(axis=-1, keepdims=True)
    return np.clip(np.rint(groups / means), -1, 1), means


def used(weight: np.ndarray, offsets: np.ndarray, group: int | str, strength: float) -> np.ndarray:
    """What the model computes with."""
    codes, means = codes_and_means(weight, group)
    rounded = (codes * means * (1 + offsets[..., None])).reshape(weight.shape)
    return weight + strength * (rounded - weight)


class Textbook:
    """A model's latent weights and offsets, trained step by step. `gradients`: those of the last step."""

    def __init__(self, case: TunedCase) -> None:
        self.case, self.group = case, case.tuning.get("qat_group", 64)
        self.weights: Arrays = {n: np.array(a).astype(np.float64) for n, a in weights_of(case)[2].items()}
        self.rounded = [n for n, w in self.weights.items() if is_ternary(n, w)]
        for name in self.rounded:
            shape = groups_of(self.weights[name], self.group).shape[:2]
            self.weights[name.removesuffix("weight") + "scale_offsets"] = np.zeros(shape)
        self._m = {n: np.zeros_like(w) for n, w in self.weights.items()}
        self._v = {n: np.zeros_like(w) for n, w in self.weights.items()}
        self.model = build_model(config_of(case), case.family)
        self.gradients: Arrays = {}

    def offsets(self, name: str) -> np.ndarray:
        return self.weights[name.removesuffix("weight") + "scale_offsets"]

    def plain(self, strength: float) -> Arrays:
        """The weights that the plain model computes with."""
        return {
            n: used(w, self.offsets(n), self.group, strength) if n in self.rounded else w
            for n, w in self.weights.items()
            if not n.endswith("scale_offsets")
        }

    def step(self, step: int) -> float:
        """One step, counted from 0; the loss before it."""
        strength, batches = self.case.strength(step), batches_of(self.case, step)
        self.model.load_weights(
            [(n, mx.array(w.astype(np.float32))) for n, w in self.plain(strength).items()]
        )
        gradient, total = nn.value_and_grad(self.model, reference_loss), counted_tokens(batches)
        loss, by_used = 0.0, dict.fromkeys(self.weights, 0.0)
        for batch in batches:
            one, found = gradient(self.model, batch, total)
            loss += one.item()
            for name, g in tree_flatten(found):
                by_used[name] = by_used[name] + np.array(g).astype(np.float64)
        for name in self.rounded:  # straight through to the weight; the scale's is its own
            codes, means = codes_and_means(self.weights[name], self.group)
            by_group = by_used[name].reshape(codes.shape) * codes * means
            by_used[name.removesuffix("weight") + "scale_offsets"] = strength * by_group.sum(-1)
        self.gradients = by_used
        self._update(step)
        return loss

    def _update(self, step: int) -> None:
        case = self.case
        norm = np.sqrt(sum(float((g**2).sum()) for g in self.gradients.values()))
        clip = min(1.0, case.clip_norm / norm) if case.clip_norm else 1.0
        for name, w in self.weights.items():
            g, m, v = self.gradients[name] * clip, self._m[name], self._v[name]
            m[:] = 0.9 * m + 0.1 * g
            v[:] = 0.999 * v + 0.001 * g * g
            update = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
            decays = w.ndim > 1 and not name.endswith("scale_offsets")
            w -= case.learning_rate * (update + (case.weight_decay * w if decays else 0.0))
