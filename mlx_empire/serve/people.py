"""Who can be asked, and with which adapter: the finished daughters of a folder, as they are at this moment.

A name is a sub-folder of the folder, and never a path. What it means is looked up for every request, so a generation
that was promoted or rolled back, and a daughter that was trained anew, answer from the next request on. An adapter that
was trained on other weights than the base's is not served.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_empire.checkpoint.manifest import sampled_digest
from mlx_empire.errors import UserError
from mlx_empire.formats.adapter_folder import WEIGHTS_NAME
from mlx_empire.run.finished import Finished, finished
from mlx_empire.run.resident import base_folder_of


class UnknownPersonError(ValueError):
    """A request for somebody who is not there; the sentence names those who are."""


@dataclass(frozen=True)
class Version:
    """An adapter's folder, and what tells it from one that took its place: device, inode, time and size of its file."""

    weights: Path
    mark: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        """One word for both."""
        return f"{self.weights}#{'.'.join(map(str, self.mark))}"


@dataclass(frozen=True)
class People:
    """The daughters in a folder that stand on one base; `digest`: of its weights, `named`: a person named it."""

    folder: Path
    base: Path
    digest: str
    named: bool = False

    @property
    def names(self) -> list[str]:
        """Who can be asked now, sorted."""
        return [name for name in _folders(self.folder) if self._found(name) is not None]

    def version(self, name: str) -> Version:
        """The adapter of `name` as it is now. UnknownPersonError."""
        found = self._found(name) if name in _folders(self.folder) else None
        if found is not None:
            with suppress(OSError):
                about = (found.weights / WEIGHTS_NAME).stat()
                mark = (about.st_dev, about.st_ino, about.st_mtime_ns, about.st_size)
                return Version(found.weights, mark)
        there = ", ".join(self.names) or "nobody"
        raise UnknownPersonError(f"model: {name[:60]!r}: nobody of that name is served; there is {there}")

    def _found(self, name: str) -> Finished | None:
        found = _finished(self.folder / name)
        speaks = found is not None and found.speaks_on(self.base, self.digest, named=self.named)
        return found if speaks else None


def people_in(folder: Path, base: Path | None) -> People:
    """The daughters of a folder; `base`: the folder of theirs, else the one that their recipes name. UserError."""
    if not folder.is_dir():
        raise UserError(f"PEOPLE: {folder}: no such folder; name the run.dir of mlx-empire daughters")
    found = {name: one for name in _folders(folder) if (one := _finished(folder / name)) is not None}
    if not found:
        raise UserError(f"PEOPLE: {folder}: no finished daughter is in it; mlx-empire daughters trains them")
    asked = base is not None
    if base is None:
        named = {name: base_folder_of(one, None, "PEOPLE") for name, one in found.items()}
        (first, base), *others = named.items()
        for name, other in others:
            if other.resolve() != base.resolve():
                raise UserError(
                    f"--model: {first} stands on {base}, {name} on {other}; name the one that is to be served"
                )
    return People(folder, base, sampled_digest(base), asked)


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _finished(folder: Path) -> Finished | None:
    """A daughter with an adapter of ours in a folder; None where there is none, or not yet."""
    with suppress(UserError, OSError):
        found = finished(folder, "PEOPLE")
        if found.adapter and found.run is not None:
            return found
    return None
