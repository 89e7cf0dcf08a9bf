"""What in texts is of this machine, and what becomes of it before they are sent.

A path becomes its last name, a base that came from the Hub its name there, the home folder ~. A path is found as a
whole, never inside of a longer word. A base in a folder that is named without a slash (`base`) is a word like any
other: it becomes its name on the Hub where the recipe, a key of settings or a sentence of the model card names a base.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mlx_empire.errors import UserError
from mlx_empire.recipe.evaluation import EvaluationSet
from mlx_empire.recipe.schema import Recipe
from mlx_empire.recipe.text import one_line

_PART = r"[\w.@+%-]+"
_EDGE = r"(?:(?<=://)(?=/)|(?<![\w./<-]))"  # before a path that is known; file:///x is one, https://x none
_PATH = rf"(?:(?<=://)(?=/)|(?<![\w:/.<>~-]))(?:~|/{_PART})(?:/{_PART})+/?"  # any other that is not relative
_END = r"(?![\w-])"
# A value of settings that is a path and nothing else; under NOTED also one of a single part, or a relative one.
_WHOLE = re.compile(r"(?:/[^/\n]+/|~/|\.{1,2}/|[A-Za-z]:[\\/])[^\n]+")
_PLACE = re.compile(r"[/~.]|[A-Za-z]:[\\/]|[^/]*/[^/]*/")
NOTED = "name_or_path"  # how keys end under which libraries note where a model came from
TOKENS = "added_tokens_decoder"  # texts that the tokenizer looks for
# Before a base's name, as `formats.model_card` writes it.
_CARD = ("base_model: ", " of `", "--model ", "trained on `", "export base ", "| base | `")


class Stripped:
    """Takes this machine's paths out of texts. `known`: the base's name on the Hub, which its path becomes."""

    def __init__(self, recipe: Recipe, known: str | None) -> None:
        self._names = {path: Path(path).name or path for path in _paths(recipe)}
        base = str(recipe.model.path)
        if known is not None:
            self._names |= {base: known, known: known}
        self._home = str(Path.home())
        paths = [p for p in sorted(self._names, key=len, reverse=True) if "/" in p and p.strip("/.")]
        told = list(map(re.escape, paths))
        home = [re.escape(self._home)] if len(self._home) > 1 else []
        forms = [rf"{_EDGE}(?:{'|'.join(told)}){_END}"] if told else []
        forms += [rf"{_EDGE}{one}(?:/{_PART})*{_END}" for one in home]
        self._found = re.compile("|".join([*forms, _PATH]))
        here = [*home, *(re.escape(p) for p in paths if p.startswith("/") and p.count("/") > 1)]
        self._here = re.compile(rf"(?<![\w.<-])(?:{'|'.join(here)}){_END}") if here else None
        after = "|".join(f"(?<={re.escape(words)})" for words in _CARD)
        self._named = re.compile(rf"(?:{after}){re.escape(base)}(?![\w./-])")
        self._base = self._names.get(base, base)

    def __call__(self, text: str) -> str:
        return self._found.sub(lambda found: self._name(found[0].rstrip("/")), text)

    def card(self, text: str) -> str:
        """The same for a model card, where it is known which words are the base's name."""
        return self(self._named.sub(lambda _: self._base, text))

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe with names for paths."""
        moved = self._moved(recipe)
        assert isinstance(moved, Recipe)
        return moved

    def settings(self, path: Path) -> bytes:
        """A JSON file of settings, in which values that are paths become names; where there are none, its own bytes.
        UserError.
        """
        try:
            raw = path.read_bytes()
            before = json.loads(raw)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not valid JSON ({one_line(str(error)[:80])})") from None
        after = self._cleaned(before)
        return raw if after == before else (json.dumps(after, indent=2) + "\n").encode()

    def require_clean(self, name: str, text: str, *, ours: bool) -> None:
        """UserError for a text in which a path of this machine is left; in one of `ours`, any path."""
        if (self._here is not None and self._here.search(text)) or (ours and re.search(_PATH, text)):
            raise UserError(f"{name}: a path of this machine is left in it; nothing was sent")

    def _name(self, path: str) -> str:
        if path in self._names:
            return self._names[path]
        return "~" if path == self._home else path.rpartition("/")[2]

    def _moved(self, value: Any) -> Any:
        if isinstance(value, BaseModel):
            changed = {name: self._moved(getattr(value, name)) for name in type(value).model_fields}
            if isinstance(value, EvaluationSet) and value.scorer is not None:
                path, _, function = value.scorer.rpartition(":")
                changed["scorer"] = f"{self._names[path]}:{function}"
            return value.model_copy(update=changed)
        if isinstance(value, tuple):
            return tuple(map(self._moved, value))
        return Path(self._names[str(value)]) if isinstance(value, Path) else value

    def _cleaned(self, value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            return {k: v if k == TOKENS else self._cleaned(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [self._cleaned(one, key) for one in value]
        if not isinstance(value, str):
            return value
        if key.endswith(NOTED) and value in self._names:
            return self._names[value]
        if _WHOLE.fullmatch(value) or (key.endswith(NOTED) and _PLACE.match(value)):
            return self._names.get(value) or re.split(r"[\\/]", value.rstrip("\\/"))[-1]
        return value


def _paths(value: Any) -> Iterator[str]:
    """Every path that a recipe names."""
    if isinstance(value, EvaluationSet) and value.scorer is not None:
        yield value.scorer.rpartition(":")[0]
    if isinstance(value, BaseModel):
        value = tuple(getattr(value, name) for name in type(value).model_fields)
    if isinstance(value, tuple):
        for one in value:
            yield from _paths(one)
    elif isinstance(value, Path):
        yield str(value)
