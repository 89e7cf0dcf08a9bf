"""What a checkpoint says about itself: MANIFEST.json, the same bytes on every node.

Read strictly: whatever is wrong with a manifest is a ValueError, and no name in it can leave the folder.

And what it says about the run that wrote it, and what that run must find again besides the checkpoint (`Origin`).
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlx_empire import __version__
from mlx_empire.checkpoint.paths import SHARD_PATTERN, shard_name
from mlx_empire.errors import UserError
from mlx_empire.formats.hf_folder import open_folder
from mlx_empire.formats.safetensors import ITEM_BYTES, open_plain
from mlx_empire.plan.shards import ShardPlan

MAX_BYTES = 256 << 20
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**53)]
ProductNumber = Annotated[int, Field(ge=-1, le=2**16)]  # -1 is attention
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
    """Values that affect bits and are decided once.

    `unrecomputed` and `kept`: the plan's `Recomputation`; None and nothing where bits are not strict, or an earlier
    version noted none. `kept`: by layer, counted from 1, the numbers of its products (`model.kept`).
    """

    cells: Count
    gradient_dtype: Literal["float32", "bfloat16"]
    unrecomputed: Count | None = None
    kept: tuple[tuple[Count, tuple[ProductNumber, ...]], ...] = ()


class Manifest(_Strict):
    """A checkpoint after `step` steps.

    `next_row`: rows of the data that have been read. `base` identifies frozen weights, which are not saved, and
    `config` the model's configuration (None: not noted), `teacher` who was
    asked about the rows. `numerics`: what the watch over leaps has seen. `shares` and `zero_stage` say how the shards
    were cut, for people.
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
    teacher: Digest | None = None
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


SAMPLES, SAMPLE_BYTES = 64, 1 << 14


def sampled_digest(folder: Path) -> str:
    """SHA-256 over each weight file's name, size, header and 64 evenly spaced samples of 16 KiB.

    Not of every byte: a base may have hundreds of GB. Two bases that differ in a tensor's dtype or shape, or were
    trained differently, have different digests; a single flipped bit may go unseen.
    """
    digest = hashlib.sha256()
    for name, header in sorted(open_folder(folder).files.items()):
        digest.update(f"{name}\0{header.file_bytes}\0".encode() + header.raw)
        with open_plain(folder / name) as file:
            for k in range(SAMPLES):
                file.seek(header.file_bytes * k // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def config_digest(folder: Path) -> str | None:
    """SHA-256 over what a model folder's config.json says, however it is laid out; None where it says nothing."""
    try:
        with open_plain(folder / "config.json") as file:
            said = json.dumps(json.load(file), sort_keys=True)
    except (OSError, UserError, ValueError, RecursionError):
        return None
    return digest_of(said.encode())


@dataclass(frozen=True)
class Origin:
    """What a run, or a daughter, stands on: the recipe as YAML, and digests of what is not saved.

    `data`: of the rows; `base`: of frozen weights (None where there are none); `config`: of what the model's
    config.json says (None where it says nothing, or an earlier version noted nothing); `teacher`: of the model that
    was asked about the rows, where there is one.
    """

    recipe: str
    data: str
    base: str | None
    config: str | None = None
    teacher: str | None = None


@dataclass(frozen=True)
class Identity:
    """A run as its checkpoints describe it."""

    origin: Origin
    global_size: int
    seed: int
    resolved: Resolved
    plan: ShardPlan

    def manifest(
        self, step: int, numerics: Mapping[str, Sequence[float]], shards: Sequence[Shard]
    ) -> Manifest:
        """The manifest of the state after `step` steps."""
        return Manifest(
            format=1,
            step=step,
            written_by=versions(),
            recipe=self.origin.recipe,
            recipe_digest=digest_of(self.origin.recipe.encode()),
            data_digest=self.origin.data,
            next_row=step * self.global_size,
            seed=self.seed,
            base=self.origin.base,
            config=self.origin.config,
            teacher=self.origin.teacher,
            resolved=self.resolved,
            numerics={name: tuple(map(float, values)) for name, values in numerics.items()},
            zero_stage=self.plan.zero_stage,
            shares=self.plan.shares,
            shards=tuple(shards),
        )


def versions() -> dict[str, str]:
    """What wrote a checkpoint."""
    packages = {name: metadata.version(name) for name in ("mlx", "mlx-lm", "numpy")}
    system = f"{platform.system()} {platform.machine()}"
    return {"mlx_empire": __version__, **packages, "python": platform.python_version(), "system": system}
