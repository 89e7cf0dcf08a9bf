"""The trained model as a folder that mlx_lm.load opens, and transformers where the family's layout is known.

One safetensors file per unit is written as the unit arrives, into a hidden sibling folder that is renamed to
its final name at the end, so an interrupted export never looks like a finished one. Folders get mode 0700 and
files 0600 whatever the umask: a model fine-tuned on private text is private until its owner says otherwise.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import mlx.core as mx

from mlx_empire.disk import with_headroom
from mlx_empire.errors import NumericsError, UserError
from mlx_empire.formats.hf_folder import INDEX_NAME, Build, ModelFolder, has_weights, open_folder
from mlx_empire.formats.hf_names import HUGGING_FACE, Layout, choose_layout
from mlx_empire.formats.hf_pieces import HfPiece
from mlx_empire.formats.safetensors import (
    CODES,
    ITEM_BYTES,
    Entry,
    array_bytes,
    file_bytes,
    read_header,
    write_tensors,
)
from mlx_empire.formats.source import FolderSource
from mlx_empire.formats.staging import (
    copy_side_files,
    disk_errors,
    fresh_folder,
    publish,
    refuse_foreign,
    remove,
    require_room,
    side_files,
    stored_config,
    write_json,
    write_text,
)
from mlx_empire.model.spec import ModelSpec, TensorSpec

NOT_TRAINED_NAME = "NOT_TRAINED.json"


class FolderWriter:
    """Writes `out` unit by unit; as a context manager it is closed at the end, or discarded after an error.

    spec, build: the model, and how mlx-lm builds it lazily (to prove that it reads the layout back).
    source_folder: where the model came from: its towers (if it has weights), tokenizer and chat template are
    carried over.

    `card`: text of the model card, none where empty; `beside`: further JSON files by name; `notes`: sentences for the
    user; `not_trained`: names of the tensors that are carried through unchanged.
    UserError at once when `out` exists and is not an export of ours, for what `plan_export` refuses, and (NoRoomError)
    when the disk has too little room.
    """

    def __init__(self, out: Path, spec: ModelSpec, build: Build, source_folder: Path | None = None) -> None:
        refuse_foreign(out)
        self._source, self._layout = plan_export(out, spec, build, source_folder)
        self.out = out
        self._spec = spec
        self._side_files = source_folder
        self.notes = list(self._layout.notes)
        self.not_trained = self._layout.carried
        self.card, self.beside = "", dict[str, Any]()
        self._weight_map: dict[str, str] = {}
        self._tensor_bytes = 0
        self._written: set[int] = set()
        self._checksums: dict[int, dict[str, int]] = {}
        self._structures: set[frozenset[tuple[str, tuple[int, ...]]]] = set()
        self._build = build
        self._temporary = out.parent / f".{out.name}.partial"
        with disk_errors(out):
            remove(self._temporary)  # what an earlier attempt left is not to be counted
            require_room(out, with_headroom(self._bytes()))
            fresh_folder(self._temporary)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.discard()

    def write_unit(self, index: int, tensors: Mapping[str, mx.array]) -> None:
        """Write one unit's tensors, named and shaped as in the spec, in the dtype that each computes in.

        Units may come in any order, each once. Holds one exported tensor beyond what the caller keeps.
        """
        unit = self._spec.units[index]
        assert index not in self._written, f"unit {index} was written before"
        shapes = {name: tuple(array.shape) for name, array in tensors.items()}
        assert shapes == {t.name: t.shape for t in unit.tensors}, f"unit {index}: not the spec's tensors"
        pieces = self._layout.units[index]
        self._write(
            index, [Entry(p.name, CODES[p.dtype], p.shape, partial(_made, p, tensors)) for p in pieces]
        )
        self._written.add(index)
        structure = frozenset((t.name.removeprefix(unit.name), t.shape) for t in unit.tensors)
        if structure not in self._structures:  # one unit of each structure is read back at the end
            self._structures.add(structure)
            self._checksums[index] = {t.name: _checksum(tensors[t.name], t) for t in unit.tensors}

    def close(self) -> None:
        """Write what is no unit (carried tensors, index, configuration, tokenizer), check, and rename."""
        missing = set(range(len(self._spec.units))) - self._written
        assert not missing, f"units {sorted(missing)} were not written"
        with disk_errors(self.out):
            self._write_towers()
            self._write_index_and_config()
            self._read_back()
            if self._side_files:
                copied, skipped = copy_side_files(self._side_files, self._temporary)
                self.notes += skipped
                if not any(name.startswith("token") for name in copied):
                    self.notes.append(f"{self._side_files} has no tokenizer; none was exported")
            if self.card:
                write_text(self._temporary / "README.md", self.card)
            for name, value in self.beside.items():
                write_json(self._temporary / name, value)
            publish(self._temporary, self.out, self._layout.kind, self.notes)

    def discard(self) -> None:
        """Remove what was written so far; `out` is left as it was."""
        remove(self._temporary)

    def _write(self, position: int, entries: list[Entry]) -> None:
        count = len(self._spec.units) + bool(self._layout.carried)
        name = f"model-{position + 1:05d}-of-{count:05d}.safetensors"
        # `pt` is what transformers writes; `mlx` tells mlx tools that the names and layouts are mlx-lm's.
        metadata = {"format": "pt" if self._layout.kind == HUGGING_FACE else "mlx"}
        with disk_errors(self.out):
            size = write_tensors(self._temporary / name, entries, metadata)
        assert read_header(self._temporary / name).file_bytes == size
        self._weight_map.update((entry.name, name) for entry in entries)
        self._tensor_bytes += sum(entry.nbytes for entry in entries)

    def _write_towers(self) -> None:
        if not self.not_trained:
            return
        assert self._source is not None
        infos = [self._source.tensors[name] for name in self.not_trained]
        copies = [Entry(t.name, t.code, t.shape, partial(file_bytes, t)) for t in infos]
        self._write(len(self._spec.units), copies)
        why = "carried through unchanged from the original model: training did not change these tensors"
        write_json(self._temporary / NOT_TRAINED_NAME, {"reason": why, "tensors": list(self.not_trained)})

    def _write_index_and_config(self) -> None:
        metadata = {"total_size": self._tensor_bytes, "total_parameters": self._spec.parameters}
        index = {"metadata": metadata, "weight_map": dict(sorted(self._weight_map.items()))}
        write_json(self._temporary / INDEX_NAME, index)
        write_json(self._temporary / "config.json", stored_config(self._spec.config, self._spec.dtype))

    def _read_back(self) -> None:
        """Check that mlx-lm reads the same values from the written files: one unit of each structure."""
        source = FolderSource(self._temporary, self._build, self._spec)
        for index, expected in self._checksums.items():
            for tensor, array in source.unit(index):
                if _checksum(array, tensor) != expected[tensor.name]:
                    place = f"{self._temporary}: tensor {tensor.name}"
                    raise NumericsError(f"{place} reads back differently; {self.out} was not made")

    def _bytes(self) -> int:
        """Of the tensors, and of what is copied along."""
        pieces = (p for unit in self._layout.units for p in unit)
        needed = sum(ITEM_BYTES[CODES[p.dtype]] * math.prod(p.shape) for p in pieces)
        needed += _carried_bytes(self._source, self.not_trained)
        files = side_files(self._side_files) if self._side_files else []
        return needed + sum(file.stat().st_size for file in files if file.is_file())


def plan_export(
    out: Path, spec: ModelSpec, build: Build, source_folder: Path | None
) -> tuple[ModelFolder | None, Layout]:
    """The source's weights, if it has any, and the layout: all that can be asked for before a model is trained.

    UserError when `out` is the source, or mlx-lm reads no layout back.
    """
    if source_folder and out.exists() and out.samefile(source_folder):
        raise UserError(f"{out}: this is the folder that the model was loaded from; choose another one")
    source = open_folder(source_folder) if source_folder and has_weights(source_folder) else None
    return source, choose_layout(spec, build, source)


def _checksum(array: mx.array, tensor: TensorSpec) -> int:
    """CRC-32 of a tensor's bytes in the dtype it is exported in."""
    total = 0
    for part in array_bytes(array.astype(getattr(mx, tensor.dtype))):
        total = zlib.crc32(part, total)
    return total


def _made(piece: HfPiece, tensors: Mapping[str, mx.array]) -> Iterator[memoryview]:
    made = piece.make(*(tensors[name] for name in piece.takes))
    return array_bytes(made.astype(getattr(mx, piece.dtype)))


def _carried_bytes(source: ModelFolder | None, names: tuple[str, ...]) -> int:
    return sum(source.tensors[n].stop - source.tensors[n].start for n in names) if source else 0
