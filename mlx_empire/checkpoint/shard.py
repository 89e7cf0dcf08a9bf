"""One rank's shard as a file: what goes into it, how it is written while it is hashed, how it is verified.

A shard holds, for each tensor that trains, the rows that this rank owns: `NAME/weights` and `NAME/STATE` for every
array of the optimizer, bit for bit as they are in memory. Units come in the order in which the optimizer updates
them, so that a unit's memory can be given back as soon as its last byte is written.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from mlx_empire import progress
from mlx_empire.checkpoint.manifest import Piece, Shard, digest_of
from mlx_empire.checkpoint.paths import open_own
from mlx_empire.comm.buffers import host_view
from mlx_empire.disk import create_private, sync_file
from mlx_empire.engine.store import LiveChunk, ShardStore
from mlx_empire.formats.safetensors import COPY_BYTES, encode_header
from mlx_empire.model.spec import BLOCK

WEIGHTS = "weights"
HASHING_THREADS = 4
CODES = {
    mx.float32: "F32",
    mx.bfloat16: "BF16",
    mx.float16: "F16",
    mx.int8: "I8",
    mx.uint8: "U8",
    mx.int16: "I16",
    mx.uint16: "U16",
    mx.int32: "I32",
    mx.uint32: "U32",
}


@dataclass
class LivePiece:
    """A piece that lies in memory: the description without its digest, and numpy views of its bytes in order."""

    unit: int
    tensor: str
    array: str
    code: str
    first_row: int
    columns: int
    rows: int = 0
    views: list[np.ndarray] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return sum(view.nbytes for view in self.views)


def live_pieces(store: ShardStore, rank: int, order: Sequence[int] | None = None) -> list[LivePiece]:
    """What `rank` saves, as views of the arrays that are in use now, unit by unit in `order` (None: as they stand).

    Main thread only; nothing is copied.
    """
    pieces: dict[tuple[str, str], LivePiece] = {}
    for index in order if order is not None else range(len(store.plan.units)):
        unit = store.plan.units[index]
        for segment, chunks in zip(unit.segments, store.chunks[unit.index], strict=True):
            if segment.kind == "frozen":
                continue
            low, high = (edge // BLOCK for edge in segment.interval(rank))
            for chunk in chunks:
                _add(pieces, unit.index, chunk, low, high)
    return list(pieces.values())


def _add(pieces: dict[tuple[str, str], LivePiece], unit: int, chunk: LiveChunk, low: int, high: int) -> None:
    """Append the rows of `chunk` that lie in the segment's rows [low, high) to its tensor's pieces."""
    spec = chunk.spec
    a, b = max(low, spec.start_row), min(high, spec.start_row + spec.rows)
    if a >= b:
        return
    assert WEIGHTS not in chunk.state, "a state's name"
    for name, array in {WEIGHTS: chunk.weights, **chunk.state}.items():
        columns = array.shape[1]
        first = spec.first_row + a - spec.start_row
        fresh = LivePiece(unit, spec.name, name, CODES[array.dtype], first, columns)
        piece = pieces.setdefault((spec.name, name), fresh)
        view = host_view(array)
        assert not view.flags.owndata, f"{spec.name}/{name}: a copy"
        piece.views.append(
            view[(a - spec.start_row) * columns : (b - spec.start_row) * columns].view(np.uint8)
        )
        piece.rows += b - a


def write_shard(
    path: Path,
    pieces: list[LivePiece],
    rank: int,
    host: str,
    passed: Callable[[int, int], None],
) -> Shard:
    """Write a new file from memory, hashing beside it, and make sure that it is on the disk.

    `passed(unit, bytes)` is called when everything of `unit` is written and its views have been dropped. Holds no
    copy. OSError where the disk refuses.
    """
    names = [(f"{p.tensor}/{p.array}", p.code, (p.rows, p.columns)) for p in pieces]
    header = encode_header(names, {"format": "mlx_empire shard"})
    with ThreadPoolExecutor(HASHING_THREADS, "hashing") as pool, create_private(path) as file:
        file.write(header)
        hashed = _write_pieces(file, pool, pieces, len(header), passed)
        progress.reach("save-fsync")
        sync_file(file)
    recorded = tuple(
        Piece(
            tensor=p.tensor,
            array=p.array,
            code=p.code,  # type: ignore[arg-type]
            first_row=p.first_row,
            rows=p.rows,
            columns=p.columns,
            digest=digest.result(),
        )
        for p, digest in zip(pieces, hashed, strict=True)
    )
    return Shard(
        file=path.name,
        rank=rank,
        host=host,
        folder=str(path.parent.parent.absolute()),
        header_bytes=len(header),
        header_digest=digest_of(header),
        pieces=recorded,
    )


def _write_pieces(
    file: BinaryIO,
    pool: ThreadPoolExecutor,
    pieces: list[LivePiece],
    written: int,
    passed: Callable[[int, int], None],
) -> list[Future[str]]:
    """Write the pieces after `written` bytes; their digests. A unit is hashed while the next one is written."""
    hashed: list[Future[str]] = []
    before: list[tuple[list[LivePiece], list[Future[str]], int]] = []

    def settle() -> None:
        for unit, digests, size in before:
            wait(digests)
            for piece in unit:
                piece.views = []
            passed(unit[-1].unit, size)
            if unit[-1] is not pieces[-1]:
                progress.reach("save-write")

    for _, group in itertools.groupby(pieces, key=lambda piece: piece.unit):
        unit = list(group)
        digests = [pool.submit(_hash, piece.views) for piece in unit]
        hashed += digests
        for piece in unit:
            for view in piece.views:
                for start in range(0, view.nbytes, COPY_BYTES):
                    file.write(view[start : start + COPY_BYTES].data)
            written += piece.nbytes
        settle()
        before = [(unit, digests, written)]
    settle()
    return hashed


def _hash(views: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for view in views:
        digest.update(view.data)
    return digest.hexdigest()


def piece_offsets(shard: Shard) -> Iterator[tuple[Piece, int]]:
    """Each piece with its first byte in the file."""
    start = shard.header_bytes
    for piece in shard.pieces:
        yield piece, start
        start += piece.nbytes


def problem_with(path: Path, shard: Shard) -> str | None:
    """What is wrong with a shard's file, naming file and tensor; None where every byte is what was written."""
    try:
        with open_own(path) as file:
            size = file.seek(0, 2)
            if size != shard.nbytes:
                return f"{path}: has {size} bytes, expected {shard.nbytes}"
            file.seek(0)
            found = digest_of(file.read(shard.header_bytes))
            if found != shard.header_digest:
                return f"{path}: header: {_differ(shard.header_digest, found)}"
        return _first_damage(path, shard)
    except OSError as error:
        return f"{path}: {error.strerror or error}"


def _first_damage(path: Path, shard: Shard) -> str | None:
    """Hash the pieces with several threads, a few in flight."""
    with ThreadPoolExecutor(HASHING_THREADS, "verifying") as pool:
        waiting: list[tuple[Piece, Future[str]]] = []
        todo = piece_offsets(shard)
        while True:
            while len(waiting) < 2 * HASHING_THREADS and (one := next(todo, None)) is not None:
                waiting.append((one[0], pool.submit(_hash_file, path, one[1], one[0].nbytes)))
            if not waiting:
                return None
            piece, future = waiting.pop(0)
            found = future.result()
            progress.moved()  # hours of reading are no hang
            if found != piece.digest:
                for _, later in waiting:
                    later.cancel()
                return f"{path}: tensor {piece.name}: {_differ(piece.digest, found)}"


def _hash_file(path: Path, start: int, nbytes: int) -> str:
    digest = hashlib.sha256()
    with open_own(path) as file:
        file.seek(start)
        for part in _parts(file, nbytes):
            digest.update(part)
    return digest.hexdigest()


def _parts(file: BinaryIO, nbytes: int) -> Iterator[bytes]:
    while nbytes > 0:
        part = file.read(min(nbytes, COPY_BYTES // HASHING_THREADS))
        if not part:
            raise OSError(0, "ended early", file.name)
        nbytes -= len(part)
        yield part


def _differ(expected: str, found: str) -> str:
    return f"digest {found[:16]}.., expected {expected[:16]}.."
