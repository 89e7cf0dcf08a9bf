"""The largest model of a shape that machines can train: a known model made larger until it no longer fits.

Decides how a shape grows: heads and layers in one proportion, as in families that come in several sizes, and by layers
alone where one more group of heads is too much. A head's width, the vocabulary, the groups of keys and the number of
experts stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_empire.cluster.hostfile import Node
from mlx_empire.model.spec import ModelSpec
from mlx_empire.plan.assess import Assessment, assess
from mlx_empire.plan.optimizer_bytes import StatesOf
from mlx_empire.plan.resolve import never_fits
from mlx_empire.recipe.schema import Recipe

DENSE, MIXTURE = "llama-3.3-70b", "llama-4-scout-109b"  # whose shapes stand for dense models and mixtures
MOST_HEADS = 512
_WIDTHS = ("hidden_size", "intermediate_size", "intermediate_size_mlp")  # grow with the heads


@dataclass(frozen=True)
class Largest:
    """The largest model of a shape that fits: how many layers and heads it has, and its plan."""

    layers: int
    heads: int
    assessment: Assessment

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.assessment.spec.base_parameters


def scaled(config: Mapping[str, Any], heads: int, layers: int) -> dict[str, Any]:
    """A catalog model's configuration with so many heads, widths in proportion to them, and so many layers."""
    if isinstance(config.get("text_config"), Mapping):
        return {**config, "text_config": scaled(config["text_config"], heads, layers)}
    widths = {
        key: int(config[key]) * heads // int(config["num_attention_heads"])
        for key in _WIDTHS
        if key in config
    }
    return {**config, **widths, "num_attention_heads": heads, "num_hidden_layers": layers}


def largest(
    recipe: Recipe,
    config: Mapping[str, Any],
    spec_of: Callable[[Mapping[str, Any]], ModelSpec],
    nodes: Sequence[Node],
    states_of: StatesOf,
) -> Largest | None:
    """The largest scale of `config` that `recipe` trains on `nodes`; None where not even the narrowest fits.

    `spec_of`: describes the model of a configuration as the recipe tunes it.
    """
    text = config.get("text_config", config)
    heads, groups, layers = (
        int(text[key]) for key in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    )

    def attempt(wide: int, deep: int) -> Largest | None:
        spec = spec_of(scaled(config, wide, deep))
        if never_fits(spec, nodes, states_of(recipe.optimizer)):
            return None
        found = assess(recipe, spec, nodes, states_of)
        return Largest(deep, wide, found) if found.verdict != "no" else None

    def in_proportion(wide: int) -> int:
        return max(round(layers * wide / heads), 1)

    width = _last(lambda n: attempt(n * groups, in_proportion(n * groups)), 0, MOST_HEADS // groups)
    if width is None:
        return None
    wide, least = width.heads, width.layers
    return _last(lambda n: attempt(wide, least + n), 0, max(least // 2, 1)) or width


def _last(attempt: Callable[[int], Largest | None], low: int, most: int) -> Largest | None:
    """What the largest number above `low` and at most `most` gives, where every number above it gives nothing."""
    best, high = None, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        found = attempt(middle)
        best, low, high = (found, middle, high) if found is not None else (best, low, middle)
    return best
