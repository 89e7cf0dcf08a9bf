"""What a daughter that is not finished needs to go on, as one file in its folder.

`unfinished.safetensors` holds its adapter and its optimizer states, bit for bit as they are in memory (`NAME/weights`,
`NAME/STATE`, as in a shard, by mlx-lm's names), and in its header the step, the place, a digest of all data, and what
it is trained on. Files are written aside, and put in place together once all of them are on the disk: those that are
trained together go on from one moment.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_empire.checkpoint.manifest import Origin
from mlx_empire.checkpoint.shard import WEIGHTS, LivePiece
from mlx_empire.daughters.generations import FOLDER, NOTE, PINNED, ROWS
from mlx_empire.disk import draft_of, sync_folder
from mlx_empire.engine.store import ShardStore
from mlx_empire.errors import UserError
from mlx_empire.formats.adapter_folder import read_tensors
from mlx_empire.formats.safetensors import COPY_BYTES, Entry, file_bytes, read_header, write_tensors
from mlx_empire.formats.seal import unseal
from mlx_empire.formats.staging import remove
from mlx_empire.model.spec import own_name
from mlx_empire.run.launched import COMPLETE
from mlx_empire.run.names import CURRENT

FILE_NAME, DRAFT_NAME = "unfinished.safetensors", ".unfinished.partial"
FORMAT = "mlx_empire unfinished 1"
KEPT_FILES = ("metrics.jsonl", FILE_NAME)  # of a daughter that goes on
ROW_FILES = (NOTE, ROWS)  # of a generation that begins
OWN_FILES = (
    *KEPT_FILES,
    *ROW_FILES,
    DRAFT_NAME,
    "recipe.yaml",
    "plan.json",
    "metrics.tmp",  # a draft of an earlier version
    COMPLETE,
    *map(draft_of, ("metrics.jsonl", "recipe.yaml", "plan.json", NOTE, COMPLETE)),
    CURRENT,
    draft_of(CURRENT),
    "final",
    ".final.partial",
    ".final.replaced",
    "BASE.json",
    "LOCK",
)


@dataclass(frozen=True)
class ResumePoint:
    """Where a daughter is: steps that are done, its place among those that train together, and on which machine.

    `last_norm`: of its last step's gradient, by which the next is clipped where units are updated in the backward.
    """

    step: int
    place: int
    machine: str
    origin: Origin
    last_norm: float = 0.0


def write_draft(folder: Path, point: ResumePoint, pieces: Iterable[LivePiece]) -> None:
    """Write its `pieces` beside what lies there and make sure that they are on the disk. OSError."""
    mine = list(pieces)
    views = [view for piece in mine for view in piece.views]
    digest = hashlib.sha256()
    for view in views:
        digest.update(view.data)
    draft = folder / DRAFT_NAME
    draft.unlink(missing_ok=True)
    entries = [
        Entry(
            f"{own_name(piece.tensor)[1]}/{piece.array}",
            piece.code,
            (piece.rows, piece.columns),
            partial(_bytes, piece),
        )
        for piece in mine
    ]
    about = {"format": FORMAT, "sha256": digest.hexdigest(), "bookmark": json.dumps(asdict(point))}
    write_tensors(draft, entries, about)


def put_in_place(folder: Path) -> None:
    """What `write_draft` wrote takes the place of what was there. OSError."""
    os.replace(folder / DRAFT_NAME, folder / FILE_NAME)
    sync_folder(folder)


def resume_point_of(folder: Path) -> ResumePoint | None:
    """Where a daughter is by the header of its file; None where there is none. UserError for a damaged one,
    UnreadableError for one that the system does not let us read.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    about = read_header(path).metadata
    try:
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']!a}")
        raw: Any = json.loads(about["bookmark"])
        told = raw["origin"]
        config = told.get("config")  # an earlier version noted none
        recipe, data, base = (str(told[key]) for key in ("recipe", "data", "base"))
        origin = Origin(recipe, data, base, config and str(config))
        step, place = int(raw["step"]), int(raw["place"])
        last_norm = float(raw.get("last_norm", 0.0))  # an earlier version noted none, and had no use for it
        if step < 1 or place < 0 or not last_norm >= 0:
            raise ValueError(f"step {step}, place {place}, norm {last_norm}")
        return ResumePoint(step, place, str(raw["machine"]), origin, last_norm)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a daughter's file ({str(error)[:80]})") from None


def read_arrays(folder: Path) -> dict[str, mx.array]:
    """All arrays of a daughter's file, evaluated. UserError where a bit of them is not as it was written."""
    path = folder / FILE_NAME
    header = read_header(path)
    digest = hashlib.sha256()
    for info in header.tensors:
        for piece in file_bytes(info):
            digest.update(piece)
    if digest.hexdigest() != header.metadata.get("sha256"):
        raise UserError(f"{path}: damaged: its data have another digest than its header says")
    arrays = read_tensors(path)
    mx.eval(arrays)
    return arrays


def restore(arrays: Mapping[str, mx.array], store: ShardStore, place: int, where: Path) -> None:
    """Put a daughter's arrays into a place where another has begun. UserError, before any change, if they do not fit.

    Where weights stay whole (stages 0-2), by the one rank that there is, and between steps.
    """
    weights: dict[str, mx.array] = {}
    states = []
    for unit in store.plan.units:
        for segment, chunks in zip(unit.segments, store.chunks[unit.index], strict=True):
            for chunk in chunks if segment.kind != "frozen" else ():
                owner, name = own_name(chunk.spec.name)
                if owner != place:
                    continue
                rows = slice(chunk.spec.first_row, chunk.spec.first_row + chunk.spec.rows)
                state = {key: arrays.get(f"{name}/{key}", mx.zeros(0))[rows] for key in chunk.state}
                tensor = store.plan.tensors[chunk.spec.name][2].tensor
                whole = arrays.get(f"{name}/{WEIGHTS}", mx.zeros(0))
                fits = whole.size == tensor.padded_size and whole.dtype == chunk.weights.dtype
                if not fits or any((a.shape, a.dtype) != _form(chunk.state[k]) for k, a in state.items()):
                    raise UserError(f"{where / FILE_NAME}: {name} is not of this adapter and optimizer")
                weights[chunk.spec.name] = whole.reshape(-1)[: tensor.size].reshape(tensor.shape)
                states.append((chunk, {key: mx.contiguous(array) for key, array in state.items()}))
    store.put(weights)
    for chunk, state in states:
        mx.eval(state)
        chunk.state = state


def forget(folder: Path) -> None:
    """Nobody goes on from here any more. OSError."""
    for name in (FILE_NAME, DRAFT_NAME):
        remove(folder / name)


def clear(folder: Path, *, goes_on: bool) -> None:
    """What an interrupted run left of a daughter goes, but for what one that goes on needs. UserError where others have
    files there.
    """
    if not folder.exists():
        return
    for path in folder.iterdir():
        if path.name in (FOLDER, PINNED):
            raise UserError(f"{path}: generations of it are kept here; move {folder} away to begin anew")
        if path.name not in OWN_FILES:
            raise UserError(f"{path}: mlx_empire did not write this; move it away")
    remove(folder / COMPLETE)  # first: what lies there is no result from now on
    unseal(folder / "final")
    for path in folder.iterdir():
        if not (goes_on and path.name in KEPT_FILES) and path.name not in ROW_FILES:
            remove(path)


def _form(array: mx.array) -> tuple[tuple[int, ...], mx.Dtype]:
    return array.shape, array.dtype


def _bytes(piece: LivePiece) -> Iterator[memoryview]:
    for view in piece.views:
        for start in range(0, view.nbytes, COPY_BYTES):
            yield view[start : start + COPY_BYTES].data
