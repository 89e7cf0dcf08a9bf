"""Decides where a teacher's values are kept, under which key, and how a row finds its own.

For every target that counts, in the order of the rows: `ids` (targets, top) int32, the teacher's likeliest tokens, and
`logs` (targets, top + 1) float16, logarithms of their probabilities and of the rest's (`model.distillation`). A row's
targets follow one another, so a row is found by how many come before it, whatever order a run reads rows in. An entry
lies beside the token cache as its entries do: a folder named by its key, made elsewhere and renamed when it is whole,
with a digest of each file. What a kill left half made is never used; the next pass removes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import numpy as np

from mlx_empire.data.batches import MicroBatch
from mlx_empire.data.cache import BYTES_PER_TOKEN, cache_folder, cached_bytes, file_digest
from mlx_empire.data.digests import noted_digest
from mlx_empire.data.rows import Rows, offsets_of
from mlx_empire.disk import building, create_private, put_folder, sync_file, sync_folder
from mlx_empire.model.distillation import bytes_per_target

FORMAT = 1
INDEX = "index.json"


@dataclass(frozen=True)
class TaughtEntry:
    """What an entry holds: values of so many `targets`, of `top` tokens each, in `folder`."""

    folder: Path
    targets: int
    top: int

    @classmethod
    def of(
        cls, rows: Rows, data: str, teacher: str, top: int, temperature: float, attention: str
    ) -> TaughtEntry:
        """`data` and `teacher`: the digests of the rows and of the model. All that the values' bits follow from."""
        versions = [version(name) for name in ("mlx", "mlx-lm")]
        said = [FORMAT, data, teacher, top, temperature, attention, *versions]
        key = hashlib.sha256(json.dumps(said).encode()).hexdigest()
        return cls(cache_folder() / "teachers" / key, rows.tokens_per_epoch, top)

    @property
    def nbytes(self) -> int:
        """Bytes of both files, about."""
        return self.targets * bytes_per_target(self.top)

    def _shapes(self) -> dict[str, tuple[str, int]]:
        """By file its dtype and columns."""
        return {"ids": ("<i4", self.top), "logs": ("<f2", self.top + 1)}


def taught_bytes(data: int, top: int) -> int:
    """What the values for so many bytes of data take, at most, as a rule: of each token a target."""
    return cached_bytes(data) // BYTES_PER_TOKEN * bytes_per_target(top)


@dataclass(frozen=True, eq=False)
class TeacherValues:
    """The values of all rows: `ids` and `logs` as they are kept, and `offsets` (rows + 1,) of the rows in them."""

    ids: np.ndarray
    logs: np.ndarray
    offsets: np.ndarray

    def of(self, batch: MicroBatch) -> tuple[np.ndarray, np.ndarray]:
        """As `batches.Teacher` of a micro-batch of these rows."""
        shape = batch.mask.shape
        ids = np.zeros((*shape, self.ids.shape[1]), np.int32)
        logs = np.zeros((*shape, self.logs.shape[1]), np.float16)
        for place, row in enumerate(batch.rows_read):
            own = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
            counted = np.flatnonzero(batch.mask[place])
            ids[place, counted], logs[place, counted] = self.ids[own], self.logs[own]
        return ids, logs


def load_values(entry: TaughtEntry, rows: Rows, *, thorough: bool) -> TeacherValues | None:
    """An entry's values as memory maps; None where it is missing or damaged in any way. `thorough`: every byte is read,
    also of files that have not changed since they were."""
    arrays = _arrays(entry, thorough=thorough)
    return None if arrays is None else TeacherValues(**arrays, offsets=offsets_of(rows.targets_per_row))


def _arrays(entry: TaughtEntry, *, thorough: bool) -> dict[str, np.ndarray] | None:
    notes = cache_folder() / "digests"
    arrays: dict[str, np.ndarray] = {}
    try:
        digests = json.loads((entry.folder / INDEX).read_text("utf-8"))
        for name, (dtype, columns) in entry._shapes().items():
            file = entry.folder / f"{name}.bin"
            read = partial(file_digest, file)
            if noted_digest("file", file, notes, read, thorough=thorough, ours=True) != digests[name]:
                return None
            arrays[name] = np.memmap(file, dtype, "r", shape=(entry.targets, columns))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return arrays


class Writer:
    """Writes an entry, values of consecutive rows at a time. OSError where the disk is full."""

    def __init__(self, entry: TaughtEntry, place: Path) -> None:
        self._entry, self._place = entry, place
        self._files: dict[str, BinaryIO] = {
            name: create_private(place / f"{name}.bin") for name in entry._shapes()
        }
        self._digests = {name: hashlib.sha256() for name in self._files}

    def add(self, ids: np.ndarray, logs: np.ndarray) -> None:
        """`ids` (targets, top) and `logs` (targets, top + 1) of the next targets."""
        for (name, (dtype, _)), values in zip(self._entry._shapes().items(), (ids, logs), strict=True):
            raw = np.ascontiguousarray(values, dtype).data
            self._files[name].write(raw)
            self._digests[name].update(raw)

    def publish(self) -> None:
        """Make what was written the entry; one that is there and whole stays."""
        for file in self._files.values():
            sync_file(file)  # a digest that is noted is believed, also after a power cut
            file.close()
        digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
        with create_private(self._place / INDEX) as made:
            made.write(json.dumps(digests).encode())
            sync_file(made)
        sync_folder(self._place)
        put_folder(self._place, self._entry.folder, lambda: _arrays(self._entry, thorough=False) is not None)


@contextmanager
def writing(entry: TaughtEntry) -> Iterator[Writer]:
    """What writes `entry`, in a folder of its own that is gone at the end unless it was published. OSError.

    Runs that ask the same at once do not wait for each other: of two machines one might be the first here and the other
    there, for as long as both passes last.
    """
    with building(entry.folder.with_name(f"{entry.folder.name}.{uuid4().hex}")) as place:
        yield Writer(entry, place)
