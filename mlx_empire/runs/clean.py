"""What may be deleted of runs: what a finished one left on its way, and tokenised data that can be made again.

Never touched: a run that is not finished, or that a process of this machine holds; `final/`; a checkpoint that a person
pinned with a file `KEEP`; files that are not ours; checkpoints outside the run's folder (`run.checkpoints`), where
others' may lie; anything behind a link.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_empire.checkpoint.paths import (
    PIN,
    drafts_in,
    held_bytes,
    is_folder,
    remove_checkpoint,
    set_aside_in,
    steps_in,
)
from mlx_empire.data.cache import tokens_folder
from mlx_empire.run.launched import COMPLETE
from mlx_empire.run.lock import LAUNCHER, RUN, is_held
from mlx_empire.run.overview import Overview, held_on_disk

LEFTOVERS = (".final.partial", ".final.replaced")  # of an export that was interrupted (`formats.staging`)


@dataclass(frozen=True)
class Deletion:
    """A folder that can go: why, what that frees, and the finished run it is of; None for the token cache's."""

    path: Path
    why: str
    bytes: int
    run: Path | None


def deletions(runs: Sequence[Overview]) -> list[Deletion]:
    """Everything that may go, in the order of the runs, then the token cache's entries."""
    finished = [run.folder for run in runs if run.complete and not run.held]
    return [*(one for folder in finished for one in _of_run(folder)), *_of_cache()]


def delete(one: Deletion) -> None:
    """Delete it. OSError where the system refuses, and for what is left alone: a run that went on since, and what was
    pinned since."""
    if one.run is None:
        shutil.rmtree(one.path)
        return
    if not (one.run / COMPLETE).exists() or is_held(one.run, RUN) or is_held(one.run, LAUNCHER):
        raise OSError(0, "the run is at work again; left alone", str(one.path))
    if one.path.parent == one.run:
        shutil.rmtree(one.path)
        return
    if _pinned(one.path):
        raise OSError(0, f"{PIN} was put into it; left alone", str(one.path))
    remove_checkpoint(one.path)


def _of_run(folder: Path) -> Iterator[Deletion]:
    root = folder / "checkpoints"
    if is_folder(root):
        groups = (
            (list(steps_in(root).values()), "a checkpoint; the run is complete"),
            (
                [path for paths in set_aside_in(root).values() for path in paths],
                "a checkpoint that was set aside",
            ),
            (drafts_in(root), "a save that was interrupted"),
        )
        for paths, why in groups:
            for path in paths:
                if not _pinned(path):
                    yield Deletion(path, why, sum(held_bytes(path).values()), folder)
    for name in LEFTOVERS:
        if is_folder(folder / name):
            yield Deletion(folder / name, "an interrupted export", held_on_disk(folder / name), folder)


def _of_cache() -> Iterator[Deletion]:
    root = tokens_folder()
    for path in sorted(root.iterdir()) if is_folder(root.parent) and is_folder(root) else ():
        ours = not path.name.startswith(".")  # else it is an entry that a run is about to store
        if ours and is_folder(path) and (path / "index.json").is_file():
            yield Deletion(path, "tokenised data; made again where it is needed", held_on_disk(path), None)


def _pinned(path: Path) -> bool:
    return (path / PIN).exists()
