"""Whether what a run writes lies apart from what it reads, asked before anything is written.

Decides that `run.dir` and `run.checkpoints` are neither the folder of the model, of the rows or of the adapter that
training begins with, nor inside of one, nor above it; links are followed. Nor may the recipe itself be the file that a
new run writes its resolved recipe to: the comments of who wrote it would be gone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from mlx_empire.errors import UserError
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.names import PLAN, RECIPE
from mlx_empire.run.resume import checkpoint_folder


def refuse_mixed(recipe: Recipe, rank: int, host: str) -> None:
    """UserError where this rank would write into what the run reads, or around it."""
    written = {"run.dir": recipe.run.dir}
    if recipe.run.checkpoints is not None:
        written["run.checkpoints"] = checkpoint_folder(recipe, rank, host)
    for key, folder in written.items():
        refuse_overlap(key, folder, _read(recipe))


def refuse_overlap(key: str, folder: Path, read: Iterable[tuple[str, Path]]) -> None:
    """UserError where the folder that `key` names is one of those that are `read` (by key), inside or above one."""
    for source, path in read:
        if (where := _where(folder, path)) is not None:
            raise UserError(
                f"{key}: {folder} {where} {source} ({path}), which is read and never changed; choose a folder beside it"
            )


def refuse_recipe(recipe: Recipe, path: Path) -> None:
    """UserError where a run that begins would replace the recipe at `path`, which somebody wrote, by its own form."""
    folder = recipe.run.dir
    if _real(folder / RECIPE) == _real(path) and path.exists() and not (folder / PLAN).exists():
        raise UserError(
            f"run.dir: {folder}: a run writes its resolved recipe to {path}, and so over yours; choose another run.dir"
        )


def _read(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """What a run reads: the key, and the path that it names."""
    yield "model.path", recipe.model.path
    for path in recipe.data.paths:
        yield ("data.path" if recipe.data.path is not None else "data.sources"), path
    if recipe.tuning.start is not None:
        yield "tuning.start", recipe.tuning.start
    if recipe.distillation.teacher is not None:
        yield "distillation.teacher", recipe.distillation.teacher


def _where(folder: Path, source: Path) -> str | None:
    """How a folder that is written to lies to one that is read, if not apart."""
    written, read = _real(folder), _real(source)
    if written == read:
        return "is"
    if read in written.parents:
        return "lies inside"
    return "lies above" if written in read.parents else None


def _real(path: Path) -> Path:
    """Without links, there or not."""
    return Path(os.path.realpath(path))
