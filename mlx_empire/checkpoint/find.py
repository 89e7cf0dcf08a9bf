"""Which checkpoint to go on from: all ranks look into their folders and decide together.

A checkpoint counts if some node has its COMMIT. It is whole if every node that has the folder has the same manifest,
the one that COMMIT names, and every shard is on some node with every byte as it was written: a damaged shard may be
replaced by its copy on another node. The newest whole one is chosen, and what was wrong with newer ones is told.
Where a shard was written to decides nothing: folders may be moved, copied and linked to, and machines renamed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_empire.checkpoint.manifest import MAX_BYTES, Manifest, Shard, decode_manifest, digest_of
from mlx_empire.checkpoint.paths import COMMIT, MANIFEST, links_in, open_own, step_name, steps_in
from mlx_empire.checkpoint.shard import problem_with
from mlx_empire.comm.protocol import Communicator
from mlx_empire.errors import DamagedError, UserError, on_all_ranks

REMEDY = "bring it back, remove that checkpoint, or start anew with run.resume: never"


@dataclass(frozen=True)
class FoundCheckpoint:
    """A whole checkpoint. `folder` is this rank's own; `readers[i]` is the rank that reads shard i, from its folder."""

    folder: Path
    manifest: Manifest
    readers: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.manifest.step


@dataclass
class _Seen:
    """What one rank has of one checkpoint. Digests are None where the file is missing, "" where it is unreadable.

    `linked`: its folder is a symbolic link, so nobody has looked into it.
    """

    folder: str
    manifest: str | None
    commit: str | None
    files: list[str] = field(default_factory=list)
    linked: bool = False


class CheckpointSearch:
    """What all ranks see in their folders `root` at this moment. Collective."""

    def __init__(self, comm: Communicator, root: Path) -> None:
        self._comm, self._root = comm, root
        mine = {str(step): vars(_look(path)) for step, path in steps_in(root).items()}
        for step, path in links_in(root).items():
            mine[str(step)] = vars(_Seen(str(path.absolute()), None, "", linked=True))
        self._seen: list[dict[int, _Seen]] = [
            {int(step): _Seen(**fields) for step, fields in one.items()} for one in comm.gather_json(mine)
        ]

    @property
    def committed(self) -> list[int]:
        """The steps of all checkpoints that count, newest first."""
        return sorted(
            {s for one in self._seen for s, seen in one.items() if seen.commit is not None}, reverse=True
        )

    @property
    def unfinished(self) -> list[int]:
        """The steps of those that no node committed, newest first."""
        return sorted({step for one in self._seen for step in one} - set(self.committed), reverse=True)

    def newest(self) -> FoundCheckpoint | None:
        """The newest whole checkpoint; None where there is none at all. DamagedError where all are damaged."""
        damage: list[str] = []
        for step in self.committed:
            found = self._judge(step, damage)
            if found is not None:
                return found
        if damage:
            raise on_all_ranks(DamagedError(f"no checkpoint is whole: {_said(damage)}; {REMEDY}"))
        return None

    def exactly(self, step: int) -> FoundCheckpoint:
        """The checkpoint of `step`. UserError where there is none, DamagedError where it is not whole."""
        if step not in self.committed:
            others = ", ".join(map(str, sorted(self.committed))) or "none"
            problem = f"run.resume: {self._root} has no checkpoint of step {step}; there are: {others}"
            raise on_all_ranks(UserError(problem))
        damage: list[str] = []
        found = self._judge(step, damage)
        if found is None:
            raise on_all_ranks(DamagedError(f"{_said(damage)}; {REMEDY}"))
        return found

    def _judge(self, step: int, damage: list[str]) -> FoundCheckpoint | None:
        """The checkpoint if it is whole; else what is wrong with it is added to `damage`."""
        try:
            manifest = self._manifest({r: one[step] for r, one in enumerate(self._seen) if step in one})
            if manifest.step != step:
                raise _Damaged(f"its manifest is of step {manifest.step}")
            readers, notes = self._readers(manifest)
        except _Damaged as error:
            damage.append(f"WARNING: {step_name(step)} is damaged: {error}")
            return None
        if damage:
            notes = [*damage, *notes, f"going on from {step_name(step)} instead"]
        return FoundCheckpoint(self._root / step_name(step), manifest, readers, tuple(notes))

    def _manifest(self, seen: dict[int, _Seen]) -> Manifest:
        """The manifest on which all nodes agree."""
        commits = {one.commit for one in seen.values() if one.commit is not None}
        (expected, *others) = sorted(commits)
        for rank, one in seen.items():
            where = f"{one.folder} on {self._comm.hostnames[rank]}"
            if one.linked:
                raise _Damaged(
                    f"{where} is a symbolic link, which is not followed; put the folder itself there"
                )
            if one.commit == "" or (others and one.commit is not None):
                problem = "differs from that of other nodes" if one.commit else "cannot be read"
                raise _Damaged(f"{COMMIT} in {where} {problem}")
            if one.manifest is None:
                raise _Damaged(f"{MANIFEST} is missing in {where}")
            if one.manifest != expected:
                raise _Damaged(
                    f"{MANIFEST} in {where}: digest {one.manifest[:16] or 'unreadable'}.., expected {expected[:16]}.."
                )
        giver = min(seen)
        text = None
        if self._comm.rank == giver:
            text = _read(Path(seen[giver].folder) / MANIFEST).decode(errors="replace")
        raw = self._comm.gather_json(text)[giver].encode()
        try:
            return decode_manifest(raw)
        except ValueError as error:
            raise _Damaged(f"{MANIFEST} in {seen[giver].folder}: {error}") from None

    def _readers(self, manifest: Manifest) -> tuple[tuple[int, ...], list[str]]:
        """Who reads which shard, each verified by its reader; and what copies had to stand in for."""
        comm, step = self._comm, manifest.step
        untried = [self._holders(shard, step) for shard in manifest.shards]
        readers: dict[int, int] = {}
        damage: list[str] = []
        while len(readers) < len(untried):
            trying = {s: untried[s].pop(0) for s in range(len(untried)) if s not in readers and untried[s]}
            lost = [s for s in range(len(untried)) if s not in readers and s not in trying]
            if lost:
                gone = [manifest.shards[s] for s in lost if not self._holders(manifest.shards[s], step)]
                missing = [_missing(shard, step) for shard in gone]
                raise _Damaged("; ".join([*dict.fromkeys(damage), *missing]))
            problems: dict[str, str] = {}
            for s, rank in trying.items():
                if rank == comm.rank:
                    shard = manifest.shards[s]
                    problem = problem_with(self._root / step_name(step) / shard.file, shard)
                    if problem:
                        problems[str(s)] = f"{problem} on {comm.hostname}"
            found = {int(s): text for one in comm.gather_json(problems) for s, text in one.items()}
            readers |= {s: rank for s, rank in trying.items() if s not in found}
            damage += found.values()
        notes = [f"WARNING: {text}; its copy on another node is used" for text in dict.fromkeys(damage)]
        chosen = tuple(readers[s] for s in range(len(readers)))
        return chosen, [*notes, *self._moved(manifest, chosen)]

    def _moved(self, manifest: Manifest, readers: tuple[int, ...]) -> list[str]:
        """A line for each place from which shards are read that were written elsewhere and lie there no more."""
        step = manifest.step

        def place(rank: int) -> str:
            return f"{self._seen[rank][step].folder} on {self._comm.hostnames[rank]}"

        moves: dict[tuple[str, str], list[str]] = {}
        for shard, reader in zip(manifest.shards, readers, strict=True):
            home = f"{_home(shard, step)} on {shard.host}"
            if home not in map(place, self._holders(shard, step)):
                moves.setdefault((home, place(reader)), []).append(shard.file)
        return [
            f"{', '.join(files)}, written to {home}, {'is' if len(files) == 1 else 'are'} read from {now}"
            for (home, now), files in moves.items()
        ]

    def _holders(self, shard: Shard, step: int) -> list[int]:
        """The ranks that have a file of that name, the one that wrote it first."""
        ranks = [r for r, one in enumerate(self._seen) if step in one and shard.file in one[step].files]
        size = max(len(ranks), 1)
        turned = (
            ranks[shard.rank % size :] + ranks[: shard.rank % size]
        )  # spread over those who share a folder
        return sorted(turned, key=lambda rank: rank != shard.rank)


class _Damaged(Exception):
    """A checkpoint is not whole."""


def _look(folder: Path) -> _Seen:
    files = sorted(path.name for path in folder.iterdir() if path.name.startswith("shard-"))
    return _Seen(str(folder.absolute()), _digest(folder / MANIFEST), _commit(folder / COMMIT), files)


def _digest(path: Path) -> str | None:
    try:
        return digest_of(_read(path))
    except FileNotFoundError:
        return None
    except OSError:
        return ""


def _commit(path: Path) -> str | None:
    """The manifest's digest that a COMMIT names."""
    try:
        record: Any = json.loads(_read(path))
        digest = record["manifest"]
        return digest if isinstance(digest, str) else ""
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def _read(path: Path) -> bytes:
    with open_own(path) as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise OSError(0, "too large", str(path))
    return raw


def _said(damage: list[str]) -> str:
    """As part of an error, which needs no warning."""
    return "; ".join(text.removeprefix("WARNING: ") for text in damage)


def _missing(shard: Shard, step: int) -> str:
    return f"{shard.file} is on none of the nodes; {shard.host} wrote it to {_home(shard, step)}"


def _home(shard: Shard, step: int) -> str:
    """The folder that a shard was written to."""
    return f"{shard.folder}/{step_name(step)}"
