"""What the tensors stored in a model's folder make of mlx-lm's model, by their names and shapes alone.

Decides that a model sees its folder's names before it is described (`settle`), and that a folder whose head mlx-lm
would drop is refused. No file is opened here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_empire.errors import UserError
from mlx_empire.model.config import HEADS, TIE
from mlx_empire.model.foreign import reason_of
from mlx_empire.model.spec import ModelSpec

Stored = Mapping[str, tuple[str, Sequence[int]]]  # a folder's tensors: name -> (dtype as MLX calls it, shape)


def sanitize(model: nn.Module, weights: dict[str, mx.array], where: Path | str) -> dict[str, mx.array]:
    """The model's own renaming of stored tensors to mlx-lm's, on lazy arrays; its failure is a UserError."""
    if not hasattr(model, "sanitize"):
        return weights
    try:
        return dict(model.sanitize(weights))
    except Exception as error:  # foreign code on foreign names: usually a KeyError for a missing tensor
        raise UserError(
            f"{where}: mlx-lm cannot map its tensors to the model ({reason_of(error)}); is it complete?"
        ) from None


def stand_ins(stored: Stored) -> dict[str, mx.array]:
    """Lazy zeros with the names, shapes and dtypes of tensors."""
    return {name: mx.zeros(tuple(shape), getattr(mx, dtype)) for name, (dtype, shape) in stored.items()}


def settle(model: nn.Module, stored: Stored, where: Path | str) -> dict[str, mx.array]:
    """Let the model that will be described and trained see a folder's tensors; returns stand-ins by mlx-lm's names.

    A few families (gemma3) tie their head only when `sanitize` finds none among the weights, and can do so
    once: the sources and the writer take the plain `build`. Works on names and shapes alone and on lazy zeros,
    so it costs nothing and opens no file.
    """
    return sanitize(model, stand_ins(stored), where)


def refuse_dropped_head(spec: ModelSpec, stored: Stored, where: Path | str) -> None:
    """UserError where the folder has a head of its own, says that it is one, and mlx-lm's model has none for it."""
    head = next((name for name in stored if name.endswith(HEADS)), None)
    vocabulary = spec.text_config.get("vocab_size")
    matrices = [t for t in spec.units[0].tensors if len(t.shape) == 2 and t.shape[0] == vocabulary]
    if head is not None and spec.text_config.get(TIE) is False and len(matrices) == 1:
        raise UserError(
            f"{where}: {head} is stored and {TIE} is false, but mlx-lm's {spec.family} has no head of its own; "
            f"it would be dropped (if it only repeats the embedding, write {TIE}: true into config.json)"
        )
