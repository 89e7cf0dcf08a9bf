"""Finished results in memory, to speak: mlx-lm's models, of which several with adapters share one base's arrays.

A model with an adapter is a copy of the base's modules, not of its arrays, with mlx-lm's adapter layers in it. So a
base is read and held once, however many adapters speak on it, and none changes it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from mlx_empire.errors import UserError
from mlx_empire.formats.adapter_folder import WEIGHTS_NAME
from mlx_empire.model.config import read_config
from mlx_empire.model.mlx_lm_modules import OURS
from mlx_empire.model.unread import learnt_positions
from mlx_empire.recipe.load import load_recipe
from mlx_empire.run.finished import Finished
from mlx_empire.run.names import RECIPE


@dataclass(frozen=True)
class Resident:
    """A model that speaks, its tokenizer (mlx-lm's), and the rows of its table of positions where it has learnt them:
    MLX reads beyond the end of such a table, and the process is aborted.
    """

    model: nn.Module
    tokenizer: Any
    positions: int | None = None

    def tokens_behind(self, prompt: str | Sequence[int], wanted: int) -> int:
        """How many of the `wanted` tokens there is room for behind a prompt. UserError for none."""
        if self.positions is None:
            return wanted
        length = len(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        if length >= self.positions:
            raise UserError(
                f"the conversation has {length} tokens, and the model's table of positions {self.positions} rows; "
                f"begin it again, or ask for less"
            )
        return min(wanted, self.positions - length)


def base_folder_of(found: Finished, named: Path | None, key: str) -> Path:
    """The folder of an adapter's base: `named`, else that of its recipe. UserError for another tool's adapter."""
    if named is not None:
        return named
    if found.run is None:
        raise UserError(f"{key}: {found.weights} does not say where its base is; name it by --model FOLDER")
    return load_recipe(found.run / RECIPE).model.path


def load_model(folder: Path) -> Resident:
    """A whole model. UserError where mlx-lm does not open it."""
    if not (folder / "config.json").exists():  # mlx-lm would look for that name on the Hub
        raise UserError(
            f"{folder}: no model is there (config.json is missing); name a finished run, or its base"
        )
    try:
        model, tokenizer = mlx_lm.load(str(folder), model_config=spelled_here(folder))[:2]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder}: mlx-lm does not open it: {str(error)[:200]}") from None
    return Resident(model, tokenizer, table_of_positions(folder))


def spelled_here(folder: Path) -> dict[str, Any] | None:
    """What mlx-lm reads over a folder's config.json: for a family of our own, what its module reads, spelled for it.
    Which tokens end an answer stays mlx-lm's to find.
    """
    with suppress(UserError):
        config = read_config(folder)
        if config["model_type"] in OURS:
            return {key: value for key, value in config.items() if key != "eos_token_id"}
    return None


def table_of_positions(folder: Path) -> int | None:
    """Rows of a folder's table of learnt positions; None without, and for a model that only speaks here."""
    with suppress(UserError):
        return learnt_positions(read_config(folder))
    return None


def speaking_with(base: Resident, weights: Path) -> Resident:
    """The base with the adapter in a folder of mlx-lm's form; it shares the base's arrays. UserError."""
    if not (weights / WEIGHTS_NAME).exists():
        raise UserError(f"{weights}: no {WEIGHTS_NAME}; mlx-empire export mlx-lm makes it of PEFT's form")
    model = shared_copy(base.model)
    try:
        load_adapters(model, str(weights))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{weights}: mlx-lm does not open it on this base: {str(error)[:200]}") from None
    model.eval()
    mx.eval(model.parameters())
    return Resident(model, base.tokenizer, base.positions)


def shared_copy(model: nn.Module) -> nn.Module:
    """Modules of their own over the same arrays."""
    arrays = {id(array): array for _, array in tree_flatten(model.parameters())}
    return copy.deepcopy(model, arrays)
