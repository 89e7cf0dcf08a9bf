"""Which settings a sweep tries, in which folders, and when how many of them go on (successive halving).

Swept keys say how adapters learn, never on what: `tuning`, `optimizer`, `schedule` and `run.seed`. Comparisons are at
steps / keep, steps / keep^2 and so on of the whole run, as many as there are settings for (Jamieson and Talwalkar,
arXiv:1502.07943): each setting follows the schedule of the whole run, so who goes on is what it would be alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from mlx_empire.errors import UserError
from mlx_empire.recipe.changes import variant
from mlx_empire.recipe.explain import leaf_fields
from mlx_empire.recipe.load import dump_recipe, parse_recipe
from mlx_empire.recipe.schema import Recipe

MOST = 256
SECTIONS = ("tuning", "optimizer", "schedule")
KEYS = ("run.seed",)


@dataclass(frozen=True)
class Setting:
    """One setting: its folder's name, the words that make it, and its recipe."""

    name: str
    words: tuple[str, ...]
    recipe: Recipe


def divided(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Words that change the recipe, and the values of each swept key. UserError for a key that is not swept."""
    changes, swept = [], {}
    for word in words:
        key, equals, value = word.partition("=")
        several = "," in value and not value.startswith(("[", "{"))
        if not equals or ("." in key and not several):
            changes.append(word)
            continue
        name = _full_name(key)
        if name in swept:
            raise UserError(f"{key}: named twice; list its values once, such as {key}=1e-4,2e-4")
        swept[name] = [one for one in value.split(",") if one]
        if not swept[name]:
            raise UserError(f"{key}: no value; list some, such as learning_rate=1e-4,2e-4")
    if not swept:
        raise UserError(
            "nothing is swept; name keys with their values, such as learning_rate=1e-4,2e-4 rank=8,16"
        )
    return changes, swept


def _full_name(key: str) -> str:
    allowed = [name for name in leaf_fields() if name.partition(".")[0] in SECTIONS or name in KEYS]
    found = [name for name in allowed if key in (name, name.partition(".")[2])]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{key}: may be {' or '.join(found)}; say which")
    raise UserError(f"{key}: cannot be swept; keys of {', '.join(SECTIONS)} can, and {', '.join(KEYS)}")


def settings_of(recipe: Recipe, swept: Mapping[str, Sequence[str]]) -> list[Setting]:
    """Every combination, in order, each with a folder of its own inside run.dir. UserError, also for one impossible."""
    made = []
    for values in product(*swept.values()):
        words = tuple(f"{key}={value}" for key, value in zip(swept, values, strict=True))
        name = ",".join(f"{word.partition('.')[2]}" for word in words)
        name = re.sub(r"[^A-Za-z0-9=,._+-]", "_", name)
        own = parse_recipe(dump_recipe(recipe), "sweep", words)
        made.append(Setting(name, words, variant(own, {"run.dir": recipe.run.dir / name})))
    if not 2 <= len(made) <= MOST:
        raise UserError(f"{len(made)} settings: a sweep compares 2 to {MOST}; name other values")
    if len({one.name for one in made}) < len(made):
        raise UserError("two settings are the same; list each value once")
    return made


def groups_of(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Those that may share a trainer over one base, in order."""
    groups: list[list[Setting]] = []
    for one in settings:
        alike = next((group for group in groups if _shape(group[0].recipe) == _shape(one.recipe)), None)
        if alike is None:
            groups.append([one])
        else:
            alike.append(one)
    return groups


def _shape(recipe: Recipe) -> Recipe:
    plain = recipe.model_copy(update={"schedule": type(recipe.schedule)()})
    return variant(plain, {"optimizer.learning_rate": 1.0, "run.dir": ""})


def rungs_of(count: int, steps: int, keep: int) -> list[tuple[int, int]]:
    """(step of a comparison, how many go on), then (all steps, how many come to the end)."""
    found: list[tuple[int, int]] = []
    times = 0
    while keep ** (times + 1) <= count and steps // keep ** (times + 1) >= 1:
        times += 1
    left = count
    for power in range(times, 0, -1):
        left = -(-left // keep)
        found.append((steps // keep**power, left))
    return [*found, (steps, left)]
