"""What differs between two recipes: what a run may change when it goes on from a checkpoint, and what-if questions.

A variant's values are set without the loader's checks, so that what is only planned can be asked about too; what is
advised to a person must be loadable and is written as they would type it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_empire.errors import UserError
from mlx_empire.recipe.explain import leaf_fields
from mlx_empire.recipe.load import parse_recipe, written
from mlx_empire.recipe.run_sections import SHORT_ROW
from mlx_empire.recipe.schema import Recipe
from mlx_empire.recipe.sections import QAT_WARMUP
from mlx_empire.recipe.text import parse_yaml

# They change where and how a run computes, what it shows and keeps, but no bit of its result.
HARMLESS_SECTIONS = ("comm", "report", "memory", "evaluation", "daughters")
HARMLESS = (
    "run.dir",
    "run.checkpoints",
    "run.save_every",
    "run.keep_last",
    "run.buddy",
    "run.eval_every",
    "run.resume",
    "run.accept_changes",
    "run.hosts",
    "model.source",
    "model.compare",
    "model.base_digest",
    "numerics.bits",  # the last ones on a GPU, and whoever changes it says so
)
NOT_HARMLESS = ("memory.gradient_dtype",)


def parse_stored(text: str, source: str) -> Recipe:
    """The recipe that a run stored, as the run meant it. UserError as from `parse_recipe`.

    One without numerics.attention is older than that key: its run attended by masks.
    """
    recipe = parse_recipe(text, source)
    told, _ = parse_yaml(text, source)
    assert isinstance(told, dict), "it was parsed as a recipe"
    attention = (told.get("numerics") or {}).get("attention", "mask")
    return variant(recipe, {"numerics.attention": "pattern" if attention == "auto" else attention})


def changes(before: Recipe, now: Recipe) -> dict[str, tuple[object, object]]:
    """Key -> (value before, value now), for every key that differs."""
    found = {}
    for name in leaf_fields():
        section, key = name.split(".")
        pair = tuple(getattr(getattr(recipe, section), key) for recipe in (before, now))
        if pair[0] != pair[1]:
            found[name] = pair
    return found


def harmless(key: str, before: Recipe, now: Recipe) -> bool:
    """Whether `key` may differ without being named in run.accept_changes."""
    if key == "run.steps":  # under any other schedule it changes every step's learning rate
        constant = before.schedule.type == now.schedule.type == "constant"
        return constant and not _relative(before, now) and not _curriculum(before, now)
    if key == "data.sources":  # what lies there is compared by digest, so they may lie elsewhere
        return _mixed(before) == _mixed(now)
    if key == "numerics.attention":
        return max(before.data.sequence_length, now.data.sequence_length) <= SHORT_ROW
    return key in HARMLESS or (key.split(".")[0] in HARMLESS_SECTIONS and key not in NOT_HARMLESS)


def require_acceptable(before: Recipe, now: Recipe, accepted: Sequence[str], checkpoint: str) -> list[str]:
    """A line for each difference; UserError with all that are neither harmless nor accepted."""
    found = changes(before, now)
    lines = {key: f"{key}: {_show(a)} -> {_show(b)}" for key, (a, b) in found.items()}
    refused = [key for key in found if key not in accepted and not harmless(key, before, now)]
    if refused:
        raise UserError(
            f"{checkpoint} was made by another recipe: {'; '.join(lines[key] for key in refused)}; put the old values "
            f"back, add run.accept_changes=[{','.join(refused)}], or start anew in another run.dir"
        )
    return list(lines.values())


def _relative(before: Recipe, now: Recipe) -> bool:
    """Whether a warm-up is measured in the run's length, which would move its end."""
    warmups = [recipe.schedule.warmup for recipe in (before, now)]
    warmups += [recipe.tuning.qat_warmup or QAT_WARMUP for recipe in (before, now) if recipe.tuning.qat]
    return any(warmup.unit == "percent" for warmup in warmups)


def _curriculum(before: Recipe, now: Recipe) -> bool:
    """Whether sources open or close at parts of the run's length."""
    return any(not source.whole for recipe in (before, now) for source in recipe.data.sources)


def _mixed(recipe: Recipe) -> list[tuple[int, float, float, float]]:
    """How sources are mixed, wherever they lie."""
    sources, paths = recipe.data.sources, recipe.data.paths
    return [(paths.index(one.path), one.weight, one.start, one.end) for one in sources]


def _show(value: object) -> str:
    return written(value) if isinstance(value, tuple) else str(value)


Changes = Mapping[str, Any]


def variant(recipe: Recipe, changes: Changes) -> Recipe:
    """`recipe` with `section.key` set for every item of `changes`."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, key = name.split(".")
        sections.setdefault(section, {})[key] = value
    copies = {s: getattr(recipe, s).model_copy(update=values) for s, values in sections.items()}
    return recipe.model_copy(update=copies)


def value(recipe: Recipe, name: str) -> Any:
    """The value of `section.key`."""
    section, key = name.split(".")
    return getattr(getattr(recipe, section), key)


EVERY_WEIGHT: Changes = {
    "tuning.type": "full",
    "tuning.bits": None,
    "tuning.layers": None,
    "tuning.unfrozen_parameters": None,
    "tuning.qat": None,
    "tuning.qat_warmup": None,
    "tuning.qat_group": None,
}
FULL_ALONE = tuple(
    name for name in EVERY_WEIGHT if name not in ("tuning.type", "tuning.bits", "tuning.layers")
)


def adapters_of(recipe: Recipe, settings: Changes) -> dict[str, Any]:
    """`settings`, which ask for adapters, as they can be typed after a recipe that may ask for parts or rounding."""
    return {**settings, **{name: None for name in FULL_ALONE if value(recipe, name) is not None}}


def typed(changes: Changes) -> str:
    """The changes as overrides on a command line: `memory.zero_stage=3 optimizer.state_bits=8`."""
    return " ".join(f"{name}={_written(v)}" for name, v in changes.items())


def _written(v: Any) -> str:
    return "null" if v is None else str(v).lower() if isinstance(v, bool) else str(v)
