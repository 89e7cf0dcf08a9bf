"""Decides how a recipe comes from a YAML file and `section.key=value` overrides, and how it goes back to
YAML.

`load_recipe` reads, `dump_recipe` writes; what was written loads as an equal recipe. Everything that can be
wrong is a UserError of one line that begins with the place: `recipes/x.yaml:12: ...` or `override
'run.steps=0': ...`.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from mlx_empire.errors import UserError
from mlx_empire.recipe.duration import Duration
from mlx_empire.recipe.explain import KeyPlace, explain, sections
from mlx_empire.recipe.schema import Recipe
from mlx_empire.recipe.text import KeyPath, one_line, parse_yaml, quote, read_small_text, scalar

MAX_BYTES = 64 * 1024  # a long recipe has 3 KiB; PyYAML reads about 100 KiB a second

_KEY = re.compile(r"[^.=\s]+\.[^.=\s]+")
_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*", re.ASCII)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file `path`, with `overrides` such as `memory.zero_stage=2` or
    `memory.shares=[2,1]`.

    A later override wins over an earlier one. Relative paths inside a recipe stay as they are: they are relative to
    the current directory, not to the file. Raises UserError (one line: place, key, value, remedy).
    """
    text = read_small_text(
        path, "recipe", MAX_BYTES, "give the path of a recipe, such as recipes/quickstart.yaml"
    )
    return parse_recipe(text, str(path), overrides)


def parse_recipe(text: str, source: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that `text` (YAML) and `overrides` make; `source` names the text in messages.
    Raises UserError.
    """
    source = one_line(source)
    value, lines = parse_yaml(text, source)
    if not isinstance(value, dict):
        found = "it is empty" if value is None else f"got {quote(value)}"
        raise UserError(
            f"{source}:{lines.get((), 1)}: {found}; expected the sections {', '.join(sections())}"
        )
    # A section whose keys are all commented out is null in YAML and empty to a person.
    value = {name: {} if section is None else section for name, section in value.items()}
    where = {key: KeyPlace(line, f"{source}:{line}") for key, line in lines.items()}
    for number, override in enumerate(overrides):
        key, replacement = parse_override(override)
        section = value.setdefault(key[0], {})
        if isinstance(section, dict):
            section[key[1]] = replacement
        where[key] = KeyPlace(len(text) + 2 + number, _override_place(override), overridden=True)
        where.setdefault(key[:1], where[key])
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        raise explain(error, where, source) from None


def parse_override(override: str) -> tuple[KeyPath, object]:
    """The key path and the value of `section.key=value`; the value follows the rules of the file."""
    place = _override_place(override)
    key, equals, written = override.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise UserError(f"{place}: expected section.key=value, such as run.steps=5 or memory.shares=[2,1]")
    if len(written) > MAX_BYTES // 16:
        raise UserError(
            f"{place}: the value is longer than {MAX_BYTES // 16} characters; write it in the recipe"
        )
    try:
        return tuple(key.split(".")), parse_yaml(written, "")[0]
    except UserError as error:
        problem = str(error).lstrip(":0123456789 ")
        hint = "; put a value with special characters in quotes" if "not valid YAML" in problem else ""
        raise UserError(f"{place}: {one_line(key[:80])}: {problem}{hint}") from None


def dump_recipe(recipe: Recipe) -> str:
    """YAML text that loads as an equal recipe: every section, every key that is not null by default."""
    lines: list[str] = []
    for name, section_class in sections().items():
        section = getattr(recipe, name)
        if section == section_class.model_construct() and not any(
            info.is_required() or info.default not in (None, ())
            for info in section_class.model_fields.values()
        ):
            continue  # nothing to say
        lines.append(f"{name}:")
        for key, info in section_class.model_fields.items():
            value = getattr(section, key)
            if value != info.default or info.default not in (None, ()):
                lines.append(f"  {key}: {written(value)}")
    return "\n".join(lines) + "\n"


def written(value: object) -> str:
    """One value in YAML 1.2: flow lists, and quotes wherever a plain word could be read as something else."""
    if isinstance(value, Duration):
        return str(value)
    if isinstance(value, BaseModel):
        fields = type(value).model_fields.items()
        pairs = [(info.alias or name, getattr(value, name), info.default) for name, info in fields]
        return "{" + ", ".join(f"{n}: {written(v)}" for n, v, default in pairs if v != default) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(written(item) for item in value) + "]"
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    text = str(value)
    if _PLAIN.fullmatch(text) and isinstance(scalar(text), str):
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)


def _override_place(override: str) -> str:
    return f"override {quote(override)}"
