"""Which checkpoints stay: the newest few, and those that a person pinned with a file `KEEP`.

Only folders with exactly a checkpoint's name are removed, of those only our own files, and never through a link. At
the start of a run what interrupted saves left is removed, and checkpoints later than the one from which the run goes
on are set aside: they belong to another course of events.

Where a disk has too little room, what is given up is checkpoints that were set aside, oldest first; then copies of
shards that lie on another node too; then the oldest checkpoints, on all nodes. The newest checkpoint stays, and those
that are pinned. What would go in vain stays: files on other disks, and everything where all of it together would not
do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from mlx_empire import progress
from mlx_empire.checkpoint.agree import Folders, agreed, in_words
from mlx_empire.checkpoint.paths import (
    COMMIT,
    PIN,
    drafts_in,
    held_bytes,
    remove_checkpoint,
    remove_own,
    set_aside_in,
    step_name,
    steps_in,
)
from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.disk import free_bytes, sync_folder
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
    """Rename a checkpoint so that it is never loaded, and removed only where room is short."""
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


Listing = Mapping[int, Mapping[str, int]]  # by step, a folder's own files and their bytes

_SHARD = re.compile(r"shard-([0-9]{5})-of-([0-9]{5})\.safetensors")


@dataclass(frozen=True)
class Candidate:
    """What may go: a checkpoint, or only `copies` in it; `files`: by the rank that leads their folder, with bytes.

    `aside`: those of a step that were set aside; `files` are then their folders.
    """

    step: int
    copies: bool
    files: Mapping[int, Mapping[str, int]]
    aside: bool = False

    @property
    def key(self) -> tuple[int, bool, bool]:
        """What tells it from the others."""
        return self.step, self.copies, self.aside

    def __str__(self) -> str:
        if self.aside:
            return f"what was set aside of {step_name(self.step)}"
        return f"copies of {step_name(self.step)}" if self.copies else step_name(self.step)

    def held(self, disk: str, disks: Sequence[str]) -> int:
        """Bytes that it holds on a disk; `disks`: by rank."""
        return sum(sum(files.values()) for rank, files in self.files.items() if disks[rank] == disk)


def give_up(
    comm: Communicator, folders: Folders, needed: Mapping[str, int], newest: int
) -> tuple[dict[str, int], list[str]]:
    """Give up what it takes to have `needed` bytes by disk free; `newest`: the step of the newest checkpoint.

    Collective; SaveFailed where a disk cannot be looked at. Returns the bytes that are free by disk then, and a line
    for each thing that was given up.
    """
    disks, told, gone = folders.disks, list[str](), set[tuple[int, bool, bool]]()
    while True:
        mine = {step: path for step, path in steps_in(folders.root).items() if step <= newest}
        pinned = [step for step, path in mine.items() if (path / PIN).exists()]
        with agreed(comm):
            room = free_bytes(folders.root)
            own = [[step, held_bytes(path)] for step, path in mine.items()] if folders.leads else []
            aside = _set_aside_bytes(folders.root) if folders.leads else {}
        seen = comm.gather_json([room, pinned, own, list(aside.items())])
        free = {disk: min(seen[r][0] for r, other in enumerate(disks) if other == disk) for disk in disks}
        kept = {step for _, pins, _, _ in seen for step in pins}
        listings: list[Listing] = [{s: files for s, files in rows if s not in kept} for _, _, rows, _ in seen]
        order = [
            *_aside([dict(rows) for _, _, _, rows in seen]),
            *candidates(listings, folders.leaders, newest),
        ]
        order = [candidate for candidate in order if candidate.key not in gone]
        chosen = to_be_given_up(free, needed, order, disks)
        if not chosen:
            return free, told
        problem = None
        try:
            progress.reach("retention")
            for candidate in chosen:
                if candidate.aside:
                    remove_all([folders.root / name for name in candidate.files.get(comm.rank, {})])
                elif candidate.step in mine and candidate.copies:
                    remove_own(mine[candidate.step], candidate.files.get(comm.rank, {}))
                elif candidate.step in mine and folders.leads:
                    remove_checkpoint(mine[candidate.step])
        except OSError as error:
            problem = in_words(error)
        said = [f" ({comm.hostnames[r]}: {p})" for r, p in enumerate(comm.gather_json(problem)) if p]
        gone |= {candidate.key for candidate in chosen}
        told += [f"gave up {candidate} for room{''.join(said)}" for candidate in chosen]


def reclaimable_bytes(root: Path) -> int:
    """Bytes in a checkpoint folder that a run which begins or goes on there may give up or removes itself.

    Drafts, what is set aside, and checkpoints that nobody pinned, also the newest: a plan counts that too.
    """
    whole = [path for path in steps_in(root).values() if not (path / PIN).exists()]
    held = sum(sum(held_bytes(path).values()) for path in [*whole, *drafts_in(root)])
    return held + sum(sum(names.values()) for names in _set_aside_bytes(root).values())


def _set_aside_bytes(root: Path) -> dict[int, dict[str, int]]:
    """By step, the folders in `root` that were set aside and hold bytes of ours; none of a step that is pinned."""
    found = {}
    for step, paths in set_aside_in(root).items():
        held = {path.name: sum(held_bytes(path).values()) for path in paths}
        if any(held.values()) and not any((path / PIN).exists() for path in paths):
            found[step] = held
    return found


def _aside(by_rank: Sequence[Listing]) -> list[Candidate]:
    """What was set aside, by step; `by_rank`: `_set_aside_bytes` of the folder that each rank leads."""
    steps = sorted({step for listing in by_rank for step in listing})
    return [
        Candidate(s, False, {rank: listing[s] for rank, listing in enumerate(by_rank) if s in listing}, True)
        for s in steps
    ]


def candidates(listings: Sequence[Listing], leaders: Sequence[int], newest: int) -> list[Candidate]:
    """What may be given up of `listings` (by rank; empty where a rank leads no folder), in the order in which it goes.

    leaders: by rank, who leads its folder.
    """
    copies, whole = [], []
    for step in sorted({step for listing in listings for step in listing}):
        found = {rank: listing[step] for rank, listing in enumerate(listings) if step in listing}
        twice = _held_twice(found, leaders)
        if twice:
            copies.append(Candidate(step, True, twice))
        if step < newest:
            rest = {
                rank: {name: n for name, n in files.items() if name not in twice.get(rank, {})}
                for rank, files in found.items()
            }
            whole.append(Candidate(step, False, rest))
    return [*copies, *whole]


def to_be_given_up(
    free: Mapping[str, int], needed: Mapping[str, int], order: Sequence[Candidate], disks: Sequence[str]
) -> list[Candidate]:
    """The first of `order` that must go so that each disk has `needed` bytes free; none where all would not do.

    One that holds nothing on a disk that lacks room is passed over. disks: by rank.
    """
    lacking = {disk: nbytes - free.get(disk, 0) for disk, nbytes in needed.items()}
    chosen = []
    for candidate in order:
        if any(lack > 0 and candidate.held(disk, disks) for disk, lack in lacking.items()):
            chosen.append(candidate)
            lacking = {disk: lack - candidate.held(disk, disks) for disk, lack in lacking.items()}
    return chosen if all(lack <= 0 for lack in lacking.values()) else []


def _held_twice(found: Mapping[int, Mapping[str, int]], leaders: Sequence[int]) -> dict[int, dict[str, int]]:
    """By folder, the shards of one checkpoint that lie, as large, in the folder of their own rank too."""
    twice: dict[int, dict[str, int]] = {}
    for rank, files in found.items():
        for name, nbytes in files.items():
            shard = _SHARD.fullmatch(name)
            if shard is None or int(shard[2]) != len(leaders):
                continue  # no shard, or one of another number of ranks: nobody knows whose
            home = leaders[int(shard[1])]
            if home != rank and found.get(home, {}).get(name) == nbytes:
                twice.setdefault(rank, {})[name] = nbytes
    return twice
