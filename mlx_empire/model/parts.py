"""Which weights full tuning trains where it is asked for parts: the last layers, and parameters by their names.

Decides what is frozen of mlx-lm's module. All else follows from the description: a frozen tensor lies in a frozen
segment, as an adapter's base does, so it has no gradient, no state of the optimizer and no place in a checkpoint, and
no layer below the lowest trained one is differentiated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_empire.errors import UserError
from mlx_empire.model.build import find_layers
from mlx_empire.recipe.sections import TuningSection

KEY = "tuning.unfrozen_parameters"


def freeze_other_parts(model: nn.Module, tuning: TuningSection, name: str) -> None:
    """Freeze what full tuning of parts leaves as it is; all of `model` trains where no part is named.

    The parts are the last `tuning.layers` layers and the parameters that `tuning.unfrozen_parameters` match: each a
    regular expression, which must fit the beginning of a parameter's path in mlx-lm's model. UserError for layers or
    names that the model does not have, and for no regular expression.
    """
    layers, patterns = tuning.layers, tuning.unfrozen_parameters
    if layers is None and patterns is None:
        return
    names = [path for path, _ in tree_flatten(model.parameters())]
    chosen = _of_last_layers(model, layers, names, name) if layers is not None else set[str]()
    for pattern in patterns or ():
        chosen |= _matching(pattern, names)
    model.freeze()
    for path, module in model.named_modules():
        own = [key for key in module if (f"{path}.{key}" if path else key) in chosen]
        if own:
            module.unfreeze(recurse=False, keys=own)
    trained = {path for path, _ in tree_flatten(model.trainable_parameters())}
    if odd := sorted(trained ^ chosen):
        raise UserError(
            f"{KEY}: {odd[0]}: it can only be trained or frozen with its module; name that, or none of it"
        )


def last_layers(layers: int | None, count: int) -> int:
    """How many last layers `tuning.layers` means of `count`: all where it is null. UserError for more."""
    if layers is not None and layers > count:
        raise UserError(f"tuning.layers: {layers}: the model has {count} layers; use {count} or less")
    return layers or count


def _of_last_layers(model: nn.Module, layers: int, names: Iterable[str], name: str) -> set[str]:
    _, _, prefix = find_layers(model, name)
    count = len(model.layers)
    starts = tuple(f"{prefix}.{n}." for n in range(count - last_layers(layers, count), count))
    return {one for one in names if one.startswith(starts)}


def _matching(pattern: str, names: Sequence[str]) -> set[str]:
    try:
        found = {name for name in names if re.match(pattern, name)}
    except re.error as error:
        raise UserError(f"{KEY}: {pattern}: no regular expression ({error}); escape it with \\") from None
    if not found:
        alike = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names)
        raise UserError(f"{KEY}: {pattern}: no parameter's name begins so; there are {', '.join(alike)}")
    return found
