"""Safetensors files: reading a header without trusting it, and writing a file one tensor at a time.

A file is 8 bytes (little-endian length N), N bytes of JSON {name: {dtype, shape, data_offsets}}, and the
data; see the format's description at https://github.com/huggingface/safetensors. Every header is checked here
before any other library sees the file: tensors must fill the data exactly, without holes or overlaps.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from mlx_empire.comm.buffers import host_view
from mlx_empire.disk import create_private, sync_file
from mlx_empire.errors import POINTER, UnreadableError, UserError, is_pointer

MAX_HEADER_BYTES = 4 << 20  # some 30,000 tensors in one file; a hostile header is read within a second
MAX_DIMENSION = 2**31 - 1  # MLX shapes are 32-bit
COPY_BYTES = 32 << 20
REMEDY = "fetch the file again"

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DTYPES = {code: name for name, code in CODES.items()}
MLX_DTYPES = {  # what mlx loads each of them as
    **DTYPES,
    **{"BOOL": "bool_", "U8": "uint8", "I8": "int8", "F8_E4M3": "uint8", "F8_E5M2": "uint8"},
    "F8_E8M0": "uint8",
    **{"U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64"},
    "F64": "float32",
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a header describes it: file, dtype code, shape, and its bytes [start, stop) in the file."""

    name: str
    file: Path
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A checked header: raw JSON, the file's size in bytes, its metadata, tensors in order of their data."""

    raw: bytes
    file_bytes: int
    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class Entry:
    """A tensor to be written; `data`, called when its turn comes, yields its row-major bytes in pieces."""

    name: str
    code: str
    shape: tuple[int, ...]
    data: Callable[[], Iterator[memoryview | bytes]]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * ITEM_BYTES[self.code]


def read_header(path: Path) -> Header:
    """Read and check a safetensors header; whatever is wrong with the file is a UserError that says what.

    UnreadableError where the system refuses to read it.
    """
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            begins = file.read(8)
            length = int.from_bytes(begins, "little")
            if is_pointer(begins + file.read(40)):
                raise UserError(f"{path}: {POINTER}")
            file.seek(8)
            if size < 8 or length > size - 8:
                raise UserError(
                    f"{path}: its header of {length} bytes does not fit in {size} bytes; {REMEDY}"
                )
            if length > MAX_HEADER_BYTES:
                raise UserError(
                    f"{path}: a header of {length} bytes is larger than {MAX_HEADER_BYTES}; {REMEDY}"
                )
            raw = file.read(length)
    except OSError as error:
        raise UnreadableError(f"{path}: {error.strerror}; {REMEDY}") from None
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
        if not isinstance(entries, dict):
            raise ValueError("not an object")
        metadata = entries.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict):
            raise ValueError("__metadata__ is not an object")
        tensors = sorted(
            (_tensor_info(path, name, entry, 8 + length) for name, entry in entries.items()),
            key=lambda t: (t.start, t.stop),
        )
        end = 8 + length
        for tensor in tensors:
            if tensor.start != end:
                raise ValueError(f"tensor {tensor.name!a} starts at byte {tensor.start}, expected {end}")
            end = tensor.stop
        if end != size:
            raise ValueError(f"its tensors end at byte {end} but the file has {size} bytes")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged safetensors header ({str(error)[:200]}); {REMEDY}") from None
    return Header(raw, size, metadata, tuple(tensors))


def write_tensors(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> int:
    """Write a new safetensors file (mode 0600, fsynced) one tensor at a time; returns its size in bytes."""
    start = encode_header(((e.name, e.code, e.shape) for e in entries), metadata)
    with create_private(path) as file:
        file.write(start)
        for entry in entries:
            written = sum(file.write(piece) for piece in entry.data())
            assert written == entry.nbytes, f"{entry.name}: {written} bytes written, {entry.nbytes} announced"
        sync_file(file)
    return len(start) + sum(entry.nbytes for entry in entries)


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file that holds these tensors (name, dtype code, shape) one after the other."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, code, shape in tensors:
        stop = start + math.prod(shape) * ITEM_BYTES[code]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    raw = json.dumps(header, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def array_bytes(array: mx.array) -> Iterator[memoryview]:
    """The row-major bytes of an array in pieces, through a zero-copy view."""
    data = host_view(mx.contiguous(array)).view(np.uint8).data
    for start in range(0, len(data), COPY_BYTES):
        yield data[start : start + COPY_BYTES]


def file_bytes(info: TensorInfo) -> Iterator[bytes]:
    """The bytes of a tensor as they stand in its file, in pieces."""
    with open_plain(info.file) as file:
        file.seek(info.start)
        left = info.stop - info.start
        while left:
            piece = file.read(min(left, COPY_BYTES))
            if not piece:
                raise UserError(f"{info.file}: ended inside tensor {info.name!a}; {REMEDY}")
            left -= len(piece)
            yield piece


def open_plain(path: Path) -> BinaryIO:
    """Open a regular file for reading, following symbolic links; pipes, devices and folders are refused."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{path}: not a regular file; {REMEDY}")
    return path.open("rb")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name[:80]!a}: expected dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in ITEM_BYTES:
        raise ValueError(f"tensor {name[:80]!a}: unknown dtype {str(code)[:20]!a}")
    if not _is_list_of_sizes(shape) or len(shape) > 32 or max(shape, default=0) > MAX_DIMENSION:
        raise ValueError(f"tensor {name[:80]!a}: bad shape {str(shape)[:80]}")
    if not _is_list_of_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name[:80]!a}: bad data_offsets {str(offsets)[:80]}")
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[code]:
        raise ValueError(
            f"tensor {name[:80]!a}: {code} {shape} does not match data_offsets {str(offsets)[:80]}"
        )
    return TensorInfo(name, path, code, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_list_of_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
