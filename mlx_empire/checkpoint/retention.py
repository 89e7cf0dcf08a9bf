"""Which checkpoints stay: the newest few, and those that a person pinned with a file `KEEP`. (Which go when a disk is
full: `shortage`.)

Only folders with exactly a checkpoint's name are removed, of those only our own files, and never through a link. At
the start of a run what interrupted saves left is removed, and checkpoints later than the one from which the run goes
on are set aside: they belong to another course of events.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from mlx_empire import progress
from mlx_empire.checkpoint.agree import Folders, agreed, in_words
from mlx_empire.checkpoint.paths import COMMIT, PIN, drafts_in, remove_checkpoint, step_name, steps_in
from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.disk import sync_folder
from mlx_empire.errors import UserError


def retain(comm: Communicator, folders: Folders, newest: int, keep_last: int | None) -> None:
    """Remove the checkpoints that are not kept any more. A pin on any node counts for all.

    Collective; SaveFailed where something could not be removed.
    """
    mine = steps_in(folders.root)
    pinned = {step for step, path in mine.items() if (path / PIN).exists()}
    pinned.update(step for steps in comm.gather_json(sorted(pinned)) for step in steps)
    with agreed(comm):
        progress.reach("retention")
        if keep_last is not None and folders.leads:
            kept = {newest, *sorted(mine)[-keep_last:], *pinned}
            remove_all([path for step, path in mine.items() if step not in kept])


def clear_the_way(comm: Communicator, folders: Folders, resumed: int) -> list[str]:
    """Before the first step after `resumed`: remove what no save finished, set aside what is later. Collective.

    Returns a line for each checkpoint that was set aside.
    """
    mine = steps_in(folders.root)
    committed = {step for step, path in mine.items() if (path / COMMIT).exists()}
    committed.update(step for steps in comm.gather_json(sorted(committed)) for step in steps)
    aside = []
    with together(comm):
        if folders.leads:
            with suppress(OSError):  # a folder with somebody's files in it stays, and is no checkpoint
                uncommitted = [path for step, path in mine.items() if step not in committed]
                remove_all([*drafts_in(folders.root), *uncommitted])
            try:
                later = [path for step, path in mine.items() if step > resumed and step in committed]
                aside = [set_aside(path).name for path in later]
            except OSError as error:
                raise UserError(f"run.checkpoints: {folders.root}: {in_words(error)}") from None
    names = {name: None for names in comm.gather_json(aside) for name in names}
    return [f"{name}: set aside, for the run goes on from step {resumed}" for name in names]


def remove_all(paths: list[Path]) -> None:
    """Remove these checkpoints; the first OSError, after all have been tried."""
    problem: OSError | None = None
    for path in paths:
        try:
            remove_checkpoint(path)
        except OSError as error:
            problem = problem or error
    if problem is not None:
        raise problem


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that it is never loaded nor removed."""
    target = path.with_name(f"superseded-{path.name.removeprefix('step-')}-{uuid4().hex[:8]}")
    os.rename(path, target)
    sync_folder(target.parent)
    return target


def make_room(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` goes; one that is there already is set aside."""
    target = root / step_name(step)
    if os.path.lexists(target):
        set_aside(target)
    return target
