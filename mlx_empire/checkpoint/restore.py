"""Weights and states from a checkpoint into a store that may be cut in any other way.

Pieces are named by tensor and row, so neither the number of ranks nor their shares nor the ZeRO stage of the run that
wrote them matters. Unit by unit, each shard's reader reads what each rank keeps and sends it there; a rank holds its
own shard and at most one unit of others'. States go through the optimizer's `convert`, which changes nothing unless
they are to have another number of bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from mlx_empire import progress
from mlx_empire.checkpoint.find import FoundCheckpoint
from mlx_empire.checkpoint.manifest import Piece
from mlx_empire.checkpoint.paths import open_own
from mlx_empire.checkpoint.shard import CODES, WEIGHTS, piece_offsets
from mlx_empire.comm.buffers import DTYPES, host_view
from mlx_empire.comm.protocol import Communicator
from mlx_empire.engine.store import LiveChunk, ShardStore
from mlx_empire.errors import UserError
from mlx_empire.model.spec import BLOCK
from mlx_empire.optim.flat import STATES
from mlx_empire.optim.protocol import ChunkId, ShardOptimizer, StepScalars, decays
from mlx_empire.plan.shards import Placement, Segment, ShardPlan, Unit

ARRAY_TYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True)
class _Place:
    """Where a piece lies: shard, first byte."""

    piece: Piece
    shard: int
    start: int


class Restore:
    """Fills `store` from `found`. Construct it on all ranks (UserError, the same on all), then call `run`."""

    def __init__(self, found: FoundCheckpoint, store: ShardStore, comm: Communicator) -> None:
        self._found, self._store, self._plan, self._comm = found, store, store.plan, comm
        self._index: dict[str, dict[str, list[_Place]]] = {}
        for shard in found.manifest.shards:
            for piece, start in piece_offsets(shard):
                arrays = self._index.setdefault(piece.tensor, {})
                arrays.setdefault(piece.array, []).append(_Place(piece, shard.rank, start))
        for unit in self._plan.units:
            for segment in unit.segments:
                for placement in segment.placements:
                    if segment.kind != "frozen":
                        self._check(segment, placement)
                    elif placement.tensor.name in self._index:  # its training would be lost
                        raise UserError(
                            f"checkpoint {found.folder}: {placement.tensor.name} was trained, and this run freezes it; "
                            "put tuning.layers and tuning.unfrozen_parameters back"
                        )

    def run(self, optimizer: ShardOptimizer, learning_rate: float) -> None:
        """Read everything. Units that nothing has been loaded into yet are made. Collective, main thread."""
        scalars = StepScalars(max(self._found.step, 1), learning_rate)
        files: dict[int, BinaryIO] = {}
        try:
            for shard, reader in enumerate(self._found.readers):
                if reader == self._comm.rank:
                    files[shard] = open_own(self._found.folder / self._found.manifest.shards[shard].file)
            for unit in self._plan.units:
                with self._store.loading(unit):
                    if not any(self._store.chunks[unit.index]):
                        buffers, _, _ = self._store.landing(unit)
                        self._store.landed(unit, buffers)
                    self._unit(unit, files)
                    self._convert(unit, optimizer, scalars)
        finally:
            for file in files.values():
                file.close()

    def _check(self, segment: Segment, placement: Placement) -> None:
        tensor, where = placement.tensor, f"checkpoint {self._found.folder}"
        arrays = self._index.get(tensor.name)
        if arrays is None or WEIGHTS not in arrays:
            raise UserError(f"{where}: tensor {tensor.name} is not in it; was it made from another model?")
        code = CODES[DTYPES[segment.dtype]]
        for name, found in arrays.items():
            if name != WEIGHTS and name not in STATES:
                raise UserError(
                    f"{where}: {tensor.name} has the state {name}, which this version of mlx_empire does not know; "
                    "go on with the version that wrote it"
                )
            found.sort(key=lambda place: place.piece.first_row)
            row = 0
            for place in found:
                if place.piece.first_row != row:
                    break
                row += place.piece.rows
            shapes = {(place.piece.code, place.piece.columns) for place in found}
            if row * BLOCK != tensor.padded_size or len(shapes) != 1:
                raise UserError(f"{where}: {tensor.name}/{name} does not have the shape {tensor.shape}")
            if name == WEIGHTS and shapes != {(code, BLOCK)}:
                raise UserError(
                    f"{where}: {tensor.name} is kept in {found[0].piece.code}, this run needs {code}; "
                    "put model.dtype back"
                )

    def _unit(self, unit: Unit, files: dict[int, BinaryIO]) -> None:
        """Move what every rank keeps of a unit from the readers' files to its place."""
        sends: list[tuple[int, np.ndarray]] = []
        receives: list[tuple[int, np.ndarray]] = []
        for s, segment in enumerate(unit.segments):
            for placement in segment.placements if segment.kind != "frozen" else ():
                targets = self._targets(unit, s, placement)
                for array, found in self._index[placement.tensor.name].items():
                    for place in found:
                        file = files.get(place.shard)
                        reader = self._found.readers[place.shard]
                        if file is not None:
                            sends += self._read(file, place, segment, placement)
                        for low, high, view in targets[array]:
                            part = _overlap(place.piece, low, high)
                            if part is None:
                                continue
                            size = place.piece.row_bytes
                            own = view[(part[0] - low) * size : (part[1] - low) * size]
                            if file is not None:
                                _fill(file, place, part, own)
                            elif reader != self._comm.rank:
                                receives.append((reader, own))
        self._comm.transfer(sends, receives)
        progress.moved()

    def _read(
        self, file: BinaryIO, place: _Place, segment: Segment, placement: Placement
    ) -> Iterator[tuple[int, np.ndarray]]:
        """What this rank sends of a piece that it reads, to each other rank in the order of its targets."""
        known: dict[tuple[int, int], np.ndarray] = {}
        for rank in range(self._comm.size):
            if rank == self._comm.rank:
                continue
            for low, high in _kept(self._plan, segment, placement, rank, place.piece.array):
                part = _overlap(place.piece, low, high)
                if part is None:
                    continue
                if part not in known:
                    known[part] = np.empty((part[1] - part[0]) * place.piece.row_bytes, np.uint8)
                    _fill(file, place, part, known[part])
                yield rank, known[part]

    def _targets(
        self, unit: Unit, s: int, placement: Placement
    ) -> dict[str, list[tuple[int, int, np.ndarray]]]:
        """Where this rank puts a tensor's rows, by array: (first row, end, bytes). Makes the states' arrays."""
        chunks = [c for c in self._store.chunks[unit.index][s] if c.spec.name == placement.tensor.name]
        targets: dict[str, list[tuple[int, int, np.ndarray]]] = {}
        for array, found in self._index[placement.tensor.name].items():
            if array == WEIGHTS and self._store.keeps_whole:
                rows = placement.tensor.padded_size // BLOCK
                whole = host_view(self._store.whole(unit.index)[s])
                view = whole[placement.start : placement.start + rows * BLOCK].view(np.uint8)
                targets[array] = [(0, rows, view)]
                continue
            piece = found[0].piece
            for chunk in chunks:
                if array != WEIGHTS:
                    chunk.state[array] = _empty(chunk, piece)
                live = chunk.weights if array == WEIGHTS else chunk.state[array]
                a = chunk.spec.first_row
                target = (a, a + chunk.spec.rows, host_view(live).view(np.uint8))
                targets.setdefault(array, []).append(target)
            targets.setdefault(array, [])
        return targets

    def _convert(self, unit: Unit, optimizer: ShardOptimizer, scalars: StepScalars) -> None:
        for segment, chunks in zip(unit.segments, self._store.chunks[unit.index], strict=True):
            if segment.kind == "frozen":
                continue
            quantised = segment.kind == "trainable"
            for chunk in chunks:
                spec = chunk.spec
                shape = self._plan.tensors[spec.name][2].tensor.shape
                identity = ChunkId(spec.tensor, spec.first_row, decays(spec.name, shape))
                chunk.state = optimizer.convert(chunk.state, identity, scalars, quantised=quantised)
                mx.eval(chunk.state)
                sizes = {name: array.nbytes for name, array in chunk.state.items()}
                expected = optimizer.state_bytes(spec.rows * BLOCK, segment.dtype, quantised=quantised)
                if sizes != expected:
                    has, needs = (_sizes(of, spec.rows) for of in (sizes, expected))
                    raise UserError(
                        f"checkpoint {self._found.folder}: {spec.name} has the states {has}, this recipe's optimizer "
                        f"needs {needs}; put optimizer.* back"
                    )


def _kept(
    plan: ShardPlan, segment: Segment, placement: Placement, rank: int, array: str
) -> Iterator[tuple[int, int]]:
    """The rows of a tensor that `rank` keeps of an array, cut as its buffers are; the order is that of `_targets`."""
    if array == WEIGHTS and plan.zero_stage < 3:
        yield 0, placement.tensor.padded_size // BLOCK
        return
    for chunk in segment.chunks(*plan.state_interval(segment, rank)):
        if chunk.name == placement.tensor.name:
            yield chunk.first_row, chunk.first_row + chunk.rows


def _overlap(piece: Piece, low: int, high: int) -> tuple[int, int] | None:
    a, b = max(piece.first_row, low), min(piece.first_row + piece.rows, high)
    return (a, b) if a < b else None


def _fill(file: BinaryIO, place: _Place, part: tuple[int, int], view: np.ndarray) -> None:
    """Read the rows `part` of a piece into `view`."""
    file.seek(place.start + (part[0] - place.piece.first_row) * place.piece.row_bytes)
    size = file.readinto(view.data)  # type: ignore[attr-defined]
    if size != view.nbytes:
        raise OSError(0, "ended early", file.name)


def _sizes(arrays: Mapping[str, int], rows: int) -> str:
    """For a message: each state with its bytes for a row of 64 weights."""
    return ", ".join(f"{name} ({nbytes // rows} bytes a row)" for name, nbytes in sorted(arrays.items()))


def _empty(chunk: LiveChunk, piece: Piece) -> mx.array:
    array = mx.empty((chunk.spec.rows, piece.columns), ARRAY_TYPES[piece.code])
    mx.eval(array)
    return array
