"""What a checkpoint says about itself: MANIFEST.json, the same bytes on every node.

Read strictly: whatever is wrong with a manifest is a ValueError, and no name in it can leave the folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlx_empire.checkpoint.paths import SHARD_PATTERN, shard_name
from mlx_empire.formats.safetensors import ITEM_BYTES

MAX_BYTES = 256 << 20
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**53)]
Text = Annotated[str, Field(max_length=4096)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Piece(_Strict):
    """Rows [first_row, first_row + rows) of one array of a tensor; a row belongs to 64 of the tensor's elements.

    `array` is `weights` or a name of the optimizer's state; `columns` are the values of a row, `code` is their dtype.
    """

    tensor: Text
    array: Text
    code: Literal["F32", "BF16", "F16", "I8", "U8", "I16", "U16", "I32", "U32"]
    first_row: Count
    rows: Count
    columns: Count
    digest: Digest

    @property
    def name(self) -> str:
        """Its name in the shard's file."""
        return f"{self.tensor}/{self.array}"

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.rows * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.columns * ITEM_BYTES[self.code]


class Shard(_Strict):
    """One rank's file: its header's bytes and their digest, then the pieces one after the other."""

    file: Annotated[str, Field(pattern=SHARD_PATTERN)]
    rank: Count
    host: Text
    folder: Text
    header_bytes: Count
    header_digest: Digest
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.header_bytes + sum(piece.nbytes for piece in self.pieces)


class Resolved(_Strict):
    """Values that affect bits and are decided once."""

    cells: Count
    gradient_dtype: Literal["float32", "bfloat16"]


class Manifest(_Strict):
    """A checkpoint after `step` steps.

    `next_row`: rows of the data that have been read. `base` identifies frozen weights, which are not saved, and
    `config` the model's configuration (None: not noted). `numerics`: what the watch over leaps has seen. `shares` and
    `zero_stage` say how the shards were cut, for people.
    """

    format: Literal[1]
    step: Count
    written_by: dict[str, Text]
    recipe: Annotated[str, Field(max_length=1 << 20)]
    recipe_digest: Digest
    data_digest: Text
    next_row: Count
    seed: Count
    base: Text | None
    config: Digest | None = None
    resolved: Resolved
    numerics: dict[Text, tuple[float, ...]]
    zero_stage: Count
    shares: tuple[float, ...]
    shards: tuple[Shard, ...]

    def encode(self) -> bytes:
        """The file's bytes."""
        return (self.model_dump_json() + "\n").encode()


def decode_manifest(raw: bytes) -> Manifest:
    """The manifest in `raw`; ValueError that says what is wrong with it."""
    try:
        manifest = Manifest.model_validate_json(raw, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"][:6]))
        raise ValueError(f"{place}: {first['msg']}" if place else str(first["msg"])) from None
    size = len(manifest.shards)
    for rank, shard in enumerate(manifest.shards):
        if shard.rank != rank or shard.file != shard_name(rank, size):
            raise ValueError(f"shards.{rank}: named {shard.file}, expected {shard_name(rank, size)}")
    if digest_of(manifest.recipe.encode()) != manifest.recipe_digest:
        raise ValueError("recipe: it does not match its digest")
    return manifest


def digest_of(raw: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(raw).hexdigest()


def coverage(shards: Sequence[Shard]) -> dict[tuple[str, str], int]:
    """Rows found of each (tensor, array)."""
    rows: dict[tuple[str, str], int] = {}
    for shard in shards:
        for piece in shard.pieces:
            key = piece.tensor, piece.array
            rows[key] = rows.get(key, 0) + piece.rows
    return rows
