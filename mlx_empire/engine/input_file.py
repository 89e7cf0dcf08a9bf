"""Where layers' inputs lie between forward and backward: a file of this rank, written and read beside the computation.

Decides that an input takes any free place, which is free again once it has been read; that one thread does both, in
order; and what a disk that fails means for the run. The file has no name, so a kill leaves nothing behind. What is
written is what was evaluated, byte by byte, so no bit of a result changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import mlx.core as mx

from mlx_empire.comm.buffers import host_view
from mlx_empire.comm.thread import CommThread
from mlx_empire.disk import is_full, read_at, unnamed_private, write_at
from mlx_empire.errors import DoesNotFitError, EmpireError, LostRankError, NoRoomError, UserError
from mlx_empire.sizes import amount

Key = tuple[int, int]  # layer and micro-batch
Observe = Callable[[tuple[str, int], float, float], None]


@dataclass
class _Stored:
    """An input that is written, has been, or is read into `array`: its place in the file, and what is under way."""

    place: int
    shape: tuple[int, ...]
    dtype: mx.Dtype
    under_way: Future[None]
    array: mx.array | None = None


class InputFile:
    """A file on the disk of `folder`, which need not exist, with `places` for inputs of at most `place_bytes` each."""

    def __init__(self, folder: Path, places: int, place_bytes: int) -> None:
        self._folder, self._places, self._place_bytes = folder, places, place_bytes
        self._file: FileIO | None = None
        self._thread: CommThread | None = None
        self._observe: Observe | None = None
        self._free = list(reversed(range(places)))
        self._stored: dict[Key, _Stored] = {}

    def open(self) -> None:
        """Make the file and take its room; again: nothing. DoesNotFitError where there is none, UserError where no file
        can be made."""
        if self._file is not None:
            return
        try:
            self._file = unnamed_private(self._folder, self._places * self._place_bytes)
        except OSError as error:
            raise self._told(error, DoesNotFitError, UserError) from None
        self._thread = CommThread("inputs")
        self._thread.observe = self._observe
        weakref.finalize(self, _end, self._thread, self._file)

    def observe(self, told: Observe | None) -> None:
        """Whom to tell of every write and read, with its beginning and end."""
        self._observe = told
        if self._thread is not None:
            self._thread.observe = told

    def begin(self) -> None:
        """A new step: what an earlier one left is forgotten."""
        for key in list(self._stored):
            self._wait(self._stored[key])
            self._forget(key)

    def write(self, layer: int, micro: int, array: mx.array) -> None:
        """Begin to write an input, which is evaluated or being so; whoever gave it waits by `written`."""
        self.open()
        assert array.nbytes <= self._place_bytes, "a row is longer than the plan's"
        try:
            view = host_view(array)
        except BufferError:  # its elements do not follow one another
            view = host_view(mx.contiguous(array))
        place = self._free.pop()
        under_way = self._submit(write_at, view.data.cast("B"), place, ("offload", layer))
        self._stored[layer, micro] = _Stored(place, array.shape, array.dtype, under_way)

    def written(self, layer: int, micro: int) -> None:
        """Wait until an input is in the file. NoRoomError for a full disk, LostRankError for one that fails."""
        self._wait(self._stored[layer, micro])

    def read(self, layer: int, micro: int) -> None:
        """Begin to read an input."""
        stored = self._stored[layer, micro]
        stored.array = mx.empty(stored.shape, stored.dtype)
        mx.eval(stored.array)
        view = host_view(stored.array).data.cast("B")
        stored.under_way = self._submit(read_at, view, stored.place, ("prefetch", layer))

    def fetched(self, layer: int, micro: int) -> mx.array:
        """Wait for an input that is read: the array that was written. LostRankError for a disk that fails."""
        stored = self._stored[layer, micro]
        self._wait(stored)
        self._forget((layer, micro))
        assert stored.array is not None, "it was read"
        return stored.array

    def _submit(
        self,
        work: Callable[[FileIO, memoryview, int], None],
        data: memoryview,
        place: int,
        name: tuple[str, int],
    ) -> Future[None]:
        assert self._thread is not None
        assert self._file is not None
        return self._thread.submit(work, self._file, data, place * self._place_bytes, name=name)

    def _wait(self, stored: _Stored) -> None:
        try:
            stored.under_way.result()
        except OSError as error:
            raise self._told(error, NoRoomError, LostRankError) from None

    def _forget(self, key: Key) -> None:
        self._free.append(self._stored.pop(key).place)

    def _told(self, error: OSError, full: type[EmpireError], otherwise: type[EmpireError]) -> EmpireError:
        where = f"memory.activation_offload: {self._folder}"
        remedy = "name another disk by run.checkpoints, or use false"
        if is_full(error):
            need = amount(self._places * self._place_bytes)
            return full(f"{where}: the disk is full, and the file takes {need}: free some room, {remedy}")
        return otherwise(f"{where}: {error.strerror}: {remedy}")


def _end(thread: CommThread, file: FileIO) -> None:
    thread.close(0.0)
    file.close()
