"""Which checkpoints stay: the newest few, and those that a person pinned with a file `KEEP`; and which of them go
where a disk is full: the oldest, but never the newest nor a pinned one.

Only folders with exactly a checkpoint's name are removed, of those only our own files, and never through a link. At
the start of a run what interrupted saves left is removed, and checkpoints later than the one from which the run goes
on are set aside: they belong to another course of events.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from mlx_empire import phases
from mlx_empire.checkpoint.agree import Folders, agreed, describe
from mlx_empire.checkpoint.disk import free_bytes
from mlx_empire.checkpoint.names import (
    COMMIT,
    PIN,
    drafts_in,
    held_bytes,
    remove_checkpoint,
    step_name,
    steps_in,
)
from mlx_empire.checkpoint.tensorfile import sync_folder
from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.errors import UserError


def retain(comm: Communicator, folders: Folders, newest: int, keep_last: int | None) -> None:
    """Remove the checkpoints that are not kept any more. A pin on any node counts for all.

    Collective; SaveFailed where something could not be removed.
    """
    mine = steps_in(folders.root)
    pinned = {step for step, path in mine.items() if (path / PIN).exists()}
    pinned.update(step for steps in comm.gather_json(sorted(pinned)) for step in steps)
    with agreed(comm):
        phases.reach("retention")
        if keep_last is not None and folders.leads:
            kept = {newest, *sorted(mine)[-keep_last:], *pinned}
            remove_all([path for step, path in mine.items() if step not in kept])


def give_up(
    comm: Communicator, folders: Folders, needed: Mapping[str, int], newest: int
) -> tuple[dict[str, int], list[str]]:
    """Remove the oldest checkpoints before `newest`, on all nodes, until `needed` bytes by disk are free.

    Nothing is removed where all of them together would not do. Collective; SaveFailed where a disk cannot be looked
    at. Returns the bytes that are free by disk then, and a line for each checkpoint that was given up.
    """
    gone: dict[int, str] = {}
    while True:
        mine = {step: path for step, path in steps_in(folders.root).items() if step < newest}
        pinned = [step for step, path in mine.items() if (path / PIN).exists()]
        with agreed(comm):
            room = free_bytes(folders.root)
            sizes = [[step, held_bytes(path)] for step, path in mine.items()] if folders.leads else []
        seen = comm.gather_json([room, pinned, sizes])
        free = {
            d: min(seen[r][0] for r, disk in enumerate(folders.disks) if disk == d) for d in folders.disks
        }
        kept = {step for _, pins, _ in seen for step in pins} | gone.keys()
        held: dict[int, dict[str, int]] = {}
        for disk, (_, _, rows) in zip(folders.disks, seen, strict=True):
            for step, nbytes in rows:
                if step not in kept:
                    there = held.setdefault(step, {})
                    there[disk] = there.get(disk, 0) + nbytes
        steps = to_be_given_up(free, needed, held)
        if not steps:
            return free, list(gone.values())
        problems = _removed(comm, [mine[s] for s in steps if s in mine] if folders.leads else [])
        gone |= {step: f"{step_name(step)} was given up for its room{problems}" for step in steps}


def _removed(comm: Communicator, paths: list[Path]) -> str:
    """Remove this rank's `paths`; what went wrong, on any rank. Collective."""
    problem = None
    try:
        phases.reach("retention")
        remove_all(paths)
    except OSError as error:
        problem = describe(error)
    return "".join(
        f" ({comm.hostnames[r]}: {p})" for r, p in enumerate(comm.gather_json(problem)) if p is not None
    )


def to_be_given_up(
    free: Mapping[str, int], needed: Mapping[str, int], held: Mapping[int, Mapping[str, int]]
) -> list[int]:
    """The oldest steps that must go so that each disk has `needed` bytes free; none where all would not do.

    held: by step the bytes that go with it, by disk. A step that has nothing on a disk that lacks room stays.
    """
    lacking = {disk: nbytes - free.get(disk, 0) for disk, nbytes in needed.items()}
    chosen = []
    for step in sorted(held):
        if any(lacking[disk] > 0 and held[step].get(disk) for disk in lacking):
            chosen.append(step)
            lacking = {disk: nbytes - held[step].get(disk, 0) for disk, nbytes in lacking.items()}
    return chosen if all(nbytes <= 0 for nbytes in lacking.values()) else []


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
                raise UserError(f"run.checkpoints: {folders.root}: {describe(error)}") from None
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
