"""A verdict on a key of another trainer's configuration, and the rules that many keys share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAPPED, REPLACED, NOT_POSSIBLE = "mapped", "replaced", "not possible"


@dataclass(frozen=True)
class Meaning:
    """A verdict, the recipe's keys with their values, and a sentence where those do not say it all."""

    verdict: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""


Rule = Callable[[Any, Mapping[str, Any]], Meaning]  # of a value and of all values by name
ALWAYS = Meaning(MAPPED, {}, "always so")


def one_of(names: Mapping[str, Any], key: str) -> Rule:
    """`names`: what a value there is called here, as a value of `key`."""

    def rule(value: Any, _: Mapping[str, Any]) -> Meaning:
        found = names.get(str(value).lower())
        if found is None:
            return Meaning(NOT_POSSIBLE, {}, f"{key} is one of {', '.join(dict.fromkeys(names.values()))}")
        return Meaning(MAPPED, {key: found})

    return rule


def always(expected: Any, otherwise: str) -> Rule:
    """A key that decides nothing here as long as it has one of the `expected` values."""
    allowed = expected if isinstance(expected, tuple) else (expected,)
    return lambda value, _: ALWAYS if value in allowed else Meaning(NOT_POSSIBLE, {}, otherwise)


def iterations(key: str) -> Rule:
    """mlx-lm counts micro-batches, also those after which nothing is updated."""

    def rule(value: Any, told: Mapping[str, Any]) -> Meaning:
        micro = int(told.get("grad_accumulation_steps") or 1)
        why = f"{value} micro-batches there, {micro} a step" if micro > 1 else ""
        return Meaning(MAPPED, {key: max(1, value // micro)}, why)

    return rule


def steps(key: str) -> Rule:
    """A number of steps, or below 1 a part of the run."""
    return lambda value, _: Meaning(MAPPED, {key: f"{100 * value:g}%" if 0 < value < 1 else value})


def strategy(key: str) -> Rule:
    """transformers' `*_strategy`: every epoch, or as another line says."""
    said: dict[str, dict[str, Any]] = {"epoch": {key: "1ep"}, "steps": {}, "no": {}, "false": {}}

    def rule(value: Any, _: Mapping[str, Any]) -> Meaning:
        found = said.get(str(value).lower())
        if found is None:
            return Meaning(NOT_POSSIBLE, {}, f"{key} is a number of steps or a part of the run")
        return Meaning(MAPPED, found, "" if found else f"what {key} says, if another line gives it")

    return rule


def all_or(key: str) -> Rule:
    """A number, or -1 for all, which is so here where nothing is said."""
    return lambda value, _: Meaning(MAPPED, {}, "all") if value == -1 else Meaning(MAPPED, {key: value})


def inverted(key: str) -> Rule:
    """A switch that says the opposite there."""

    def rule(value: Any, _: Mapping[str, Any]) -> Meaning:
        if not isinstance(value, bool):
            raise ValueError("neither true nor false")
        return Meaning(MAPPED, {key: not value}, "the other way round")

    return rule
