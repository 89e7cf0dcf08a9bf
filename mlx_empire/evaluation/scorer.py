"""A person's own measure of generated answers: `scorer: file.py:function` in an evaluation set.

The function is called as function(prompt, answer, row): the question's text, what the model said, and the row as it
stands in the file. It returns a number, larger for better; a set's score is the mean. It runs on rank 0 alone, as what
it is: code of the person who gives the command. plan.json says by which bytes of the file a run was scored.
"""

from __future__ import annotations

import hashlib
import math
import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_empire.errors import UserError
from mlx_empire.recipe.schema import Recipe
from mlx_empire.recipe.text import one_line

Scorer = Callable[[str, str, Any], float]


def load_scorer(named: str) -> Scorer:
    """The function that `file.py:function` names, which gives finite numbers. UserError."""
    path, _, name = named.rpartition(":")
    try:
        found = runpy.run_path(path).get(name)
    except OSError as error:
        raise UserError(f"evaluation.sets: scorer: {path}: {error.strerror}") from None
    except Exception as error:  # whatever the file does
        raise UserError(f"evaluation.sets: scorer: {path}: {_said(error)}") from None
    if not callable(found):
        raise UserError(f"evaluation.sets: scorer: {path}: has no function {name}")

    def scored(prompt: str, answer: str, row: Any) -> float:
        try:
            value = float(found(prompt, answer, row))
        except Exception as error:
            raise UserError(f"evaluation.sets: scorer: {named}: {_said(error)}, for {answer!r:.60}") from None
        if not math.isfinite(value):
            raise UserError(f"evaluation.sets: scorer: {named}: gave {value} for {answer!r:.60}")
        return value

    return scored


def asked_text(row: Mapping[str, Any]) -> str:
    """The question of a row: its prompt, or what its last message of a user says."""
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"])
    messages: Sequence[Any] = row.get("messages") or []
    said = [one.get("content") for one in messages if isinstance(one, dict) and one.get("role") == "user"]
    return str(said[-1]) if said else ""


def scorer_digests(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of each scorer's file, by its path. UserError."""
    found = {}
    for one in recipe.evaluation.sets:
        if one.scorer is not None:
            path = one.scorer.rpartition(":")[0]
            try:
                found[path] = f"sha256:{hashlib.sha256(Path(path).read_bytes()).hexdigest()}"
            except OSError as error:
                raise UserError(f"evaluation.sets: scorer: {path}: {error.strerror}") from None
    return found


def _said(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}"[:160])
