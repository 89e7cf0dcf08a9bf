"""Which checkpoint to go on from: all ranks look into their folders and decide together.

A checkpoint counts if some node has its COMMIT. It is whole if every node that has the folder has the same manifest,
the one that COMMIT names, and every shard is on some node with every byte as it was written: a damaged shard may be
replaced by its copy on another node. The newest whole one is chosen, and what was wrong with newer ones is told.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_empire.checkpoint.manifest import MAX_BYTES, Manifest, Shard, decode, digest_of
from mlx_empire.checkpoint.names import COMMIT, MANIFEST, open_own, step_name, steps_in
from mlx_empire.checkpoint.shard import problem_with
from mlx_empire.comm.protocol import Communicator
from mlx_empire.errors import DamagedError, UserError, on_all_ranks

REMEDY = "bring it back, remove that checkpoint, or start anew with run.resume: never"


@dataclass(frozen=True)
class Found:
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
    """What one rank has of one checkpoint. Digests are None where the file is missing, "" where it is unreadable."""

    folder: str
    manifest: str | None
    commit: str | None
    files: list[str] = field(default_factory=list)


class Survey:
    """What all ranks see in their folders `root` at this moment. Collective."""

    def __init__(self, comm: Communicator, root: Path) -> None:
        self._comm, self._root = comm, root
        mine = {str(step): vars(_look(path)) for step, path in steps_in(root).items()}
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

    def newest(self) -> Found | None:
        """The newest whole checkpoint; None where there is none at all. DamagedError where all are damaged."""
        damage: list[str] = []
        for step in self.committed:
            found = self._judge(step, damage)
            if found is not None:
                return found
        if damage:
            raise on_all_ranks(DamagedError(f"no checkpoint is whole: {_said(damage)}; {REMEDY}"))
        return None

    def exactly(self, step: int) -> Found:
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

    def _judge(self, step: int, damage: list[str]) -> Found | None:
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
        return Found(self._root / step_name(step), manifest, readers, tuple(notes))

    def _manifest(self, seen: dict[int, _Seen]) -> Manifest:
        """The manifest on which all nodes agree."""
        commits = {one.commit for one in seen.values() if one.commit is not None}
        (expected, *others) = sorted(commits)
        for rank, one in seen.items():
            where = f"{one.folder} on {self._comm.hostnames[rank]}"
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
            return decode(raw)
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
        for shard in manifest.shards:
            holders = {(comm.hostnames[r], self._seen[r][step].folder): r for r in self._holders(shard, step)}
            home = f"{shard.folder}/{step_name(step)}"
            if (shard.host, home) not in holders:
                host, folder = next(place for place, r in holders.items() if r == readers[shard.rank])
                notes.append(
                    f"{shard.file}, written to {home} on {shard.host}, is read from {folder} on {host}"
                )
        return tuple(readers[s] for s in range(len(readers))), notes

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
    return f"{shard.file} is on none of the nodes; {shard.host} wrote it to {shard.folder}/{step_name(step)}"
