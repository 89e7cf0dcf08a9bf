"""Decides what a person reads when a recipe is wrong: one line with place, key, value and the nearest valid
choice.

pydantic finds what is wrong; this module chooses the one error to show first and says it with the
descriptions that stand in the schema.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mlx_empire.errors import UserError
from mlx_empire.recipe.schema import Recipe
from mlx_empire.recipe.text import KeyPath, one_line, quote

_COMPARED = 60  # characters of a mistyped word that are compared with the known ones


class KeyPlace(NamedTuple):
    """Where a key was given: its order among the keys, the words of the message, whether by an override."""

    order: int
    words: str
    overridden: bool = False


def sections() -> dict[str, type[BaseModel]]:
    """The section classes of a recipe, by name."""
    return {name: _section(info) for name, info in Recipe.model_fields.items()}


def leaf_fields() -> dict[str, FieldInfo]:
    """Every key of a recipe by its dotted name, `model.path` to `run.hosts`."""
    return {
        f"{name}.{key}": info
        for name, section in sections().items()
        for key, info in section.model_fields.items()
    }


def explain(error: ValidationError, where: Mapping[KeyPath, KeyPlace], source: str) -> UserError:
    """The one line for the first thing to mend.

    `where` says where each key was given; `source` names the recipe when no place is known.
    """

    def rank(details: ErrorDetails) -> tuple[bool, int]:
        # Unknown keys first: one of them is often the misspelled name of a missing key.
        unknown = details["type"] == "extra_forbidden"
        return not unknown, _place(_key(details, where), where, source).order

    details = min(error.errors(include_url=False), key=rank)
    key = _key(details, where)
    name = one_line(".".join(key)[:80]) or "recipe"
    return UserError(f"{_place(key, where, source).words}: {name}: {_sentence(key, details)}")


def _key(details: ErrorDetails, where: Mapping[KeyPath, KeyPlace]) -> KeyPath:
    """The dotted key that an error is about (pydantic's location goes on into unions and tuples)."""
    if details["type"] != "impossible":
        return tuple(str(part) for part in details["loc"][:2])
    suspects: list[KeyPath] = [tuple(name.split(".")) for name in details["ctx"]["keys"]]
    overridden = [key for key in suspects if key in where and where[key].overridden]
    written = [key for key in suspects if key in where]
    return (overridden or written or suspects)[0]


def _place(key: KeyPath, where: Mapping[KeyPath, KeyPlace], source: str) -> KeyPlace:
    """Where `key` stands, else its section, else the file."""
    for known in (key, key[:1]):
        if known and known in where:
            return where[known]
    return KeyPlace(0, source)


def _sentence(key: KeyPath, details: ErrorDetails) -> str:
    if details["type"] == "extra_forbidden" and len(details["loc"]) <= 2:
        return f"unknown key; {nearest_key(key)}"
    if details["type"] == "refused":
        return one_line(str(details["ctx"]["sentence"]))
    if details["type"] == "impossible":
        return one_line(str(details["ctx"]["message"]))
    if not key:
        return f"got {quote(details['input'])}; expected the sections {', '.join(sections())}"
    if len(key) == 1:
        keys = ", ".join(sections()[key[0]].model_fields)
        if details["type"] == "missing":
            return f"this section is missing; {_needs(key[0])}"
        return f"got {quote(details['input'])}; expected a section with keys among {keys}"
    info = leaf_fields()[".".join(key)]
    incomplete = details["type"] == "missing" and len(details["loc"]) > 2  # a list with too few items
    if details["type"] == "missing" and not incomplete:
        return f"missing; give {info.description}"
    inside = [part for part in details["loc"][2:] if isinstance(part, int)]
    position = f" at position {inside[0] + 1}" if inside and not incomplete else ""
    hint = nearest_choice(details["input"], info)
    if details["type"] == "extra_forbidden":
        return f"unknown key {quote(str(details['loc'][-1]))}{position}; expected {info.description}"
    return f"got {quote(details['input'])}{position}; expected {info.description}{hint}"


def _needs(section: str) -> str:
    required = [key for key, info in sections()[section].model_fields.items() if info.is_required()]
    if section == "data":  # or data.sources, which few recipes have
        required.insert(0, "path")
    return f"add '{section}:' with {' and '.join(required)}"


def nearest_key(key: KeyPath) -> str:
    """A question that names the known key most like `key`, or else a list of the known ones."""
    section, leaf = key[0][:_COMPARED], key[-1][:_COMPARED]
    known = leaf_fields()
    if section not in sections():
        near = difflib.get_close_matches(section, sections(), n=1)
        if near:
            return f"did you mean {one_line('.'.join((near[0], *key[1:]))[:80])}?"
        here = ", ".join(sections())
    else:
        here = ", ".join(sections()[section].model_fields)
        near = difflib.get_close_matches(leaf, sections()[section].model_fields, n=1)
        if near:
            return f"did you mean {section}.{near[0]}?"
    homes = {dotted.split(".")[1]: dotted for dotted in known}
    near = difflib.get_close_matches(leaf, homes, n=1, cutoff=0.75)
    return f"did you mean {homes[near[0]]}?" if near else f"known here: {here}"


def nearest_choice(value: object, info: FieldInfo) -> str:
    """`; did you mean X?` with the listed choice most like `value`, or nothing."""
    choices = list(_choices(info.annotation))
    if isinstance(value, str):
        words = [str(choice) for choice in choices]
        near = difflib.get_close_matches(value[:_COMPARED].lower(), words, n=1)
        return f"; did you mean {near[0]}?" if near else ""
    numbers = [choice for choice in choices if isinstance(choice, int)]
    if isinstance(value, int | float) and not isinstance(value, bool) and numbers:
        return f"; did you mean {min(numbers, key=lambda number: abs(number - value))}?"
    return ""


def _choices(annotation: Any) -> Iterator[object]:
    """Every value that a Literal (or bool) lists anywhere in `annotation`."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif annotation is bool:
        yield from ("true", "false")
    else:
        for part in get_args(annotation):
            yield from _choices(part)


def _section(info: FieldInfo) -> type[BaseModel]:
    assert isinstance(info.annotation, type)
    assert issubclass(info.annotation, BaseModel)
    return info.annotation
