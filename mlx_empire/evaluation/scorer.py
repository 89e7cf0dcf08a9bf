"""A person's own measure of generated answers: `scorer: file.py:function` in an evaluation set.

The function is called as function(prompt, answer, row): the question's text, what the model said, and the row as it
stands in the file. It returns a number, larger for better; a set's score is the mean. It runs on rank 0 alone, as what
it is: code of the person who gives the command. Its file is read once, and plan.json says by which bytes a run was
scored.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_empire.errors import UserError
from mlx_empire.recipe.evaluation import EvaluationSet
from mlx_empire.recipe.text import one_line


@dataclass(frozen=True)
class Scorer:
    """The function that `named` (`file.py:function`) means, and the SHA-256 of the bytes of its file that were run."""

    named: str
    digest: str
    function: Callable[[str, str, Any], Any]

    @property
    def path(self) -> str:
        """Its file."""
        return self.named.rpartition(":")[0]

    def __call__(self, prompt: str, answer: str, row: Any) -> float:
        """The score of an answer, finite. UserError."""
        try:
            value = float(self.function(prompt, answer, row))
        except Exception as error:  # whatever the function does
            raise UserError(
                f"evaluation.sets: scorer: {self.named}: {_said(error)}, for {answer!r:.60}"
            ) from None
        if not math.isfinite(value):
            raise UserError(f"evaluation.sets: scorer: {self.named}: gave {value} for {answer!r:.60}")
        return value


def load_scorers(sets: Sequence[EvaluationSet]) -> dict[str, Scorer]:
    """By title the scorer of each set that has one; a file of several is read and run once. UserError."""
    files: dict[str, tuple[str, Mapping[str, Any]]] = {}
    found = {}
    for one in sets:
        if one.scorer is not None:
            path, _, name = one.scorer.rpartition(":")
            files[path] = digest, names = files.get(path) or _run(path)
            if not callable(names.get(name)):
                raise UserError(f"evaluation.sets: scorer: {path}: has no function {name}")
            found[one.title] = Scorer(one.scorer, digest, names[name])
    return found


def _run(path: str) -> tuple[str, Mapping[str, Any]]:
    """Run a file: the digest of its bytes, and what they define. UserError."""
    module = ModuleType(f"scorer {path}")
    module.__file__ = path
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"evaluation.sets: scorer: {path}: {error.strerror}") from None
    sys.modules[module.__name__] = module  # classes look for their module there
    try:
        exec(compile(raw, path, "exec"), module.__dict__)  # noqa: S102  that is what a scorer is
    except Exception as error:  # whatever the file does
        raise UserError(f"evaluation.sets: scorer: {path}: {_said(error)}") from None
    return f"sha256:{hashlib.sha256(raw).hexdigest()}", module.__dict__


def asked_text(row: Mapping[str, Any]) -> str:
    """The question of a row: its prompt, or what its last message of a user says."""
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"])
    messages: Sequence[Any] = row.get("messages") or []
    said = [one.get("content") for one in messages if isinstance(one, dict) and one.get("role") == "user"]
    return str(said[-1]) if said else ""


def _said(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}"[:160])
