"""A Hugging Face folder's weights as its safetensors headers describe them; which files belong to the model.

With `model.safetensors.index.json` its map decides, else every `model*.safetensors`. Names in the index are
plain file names; the files themselves may be symbolic links, as in Hugging Face's cache. Pickles are never
read.
"""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_empire.errors import UserError
from mlx_empire.formats.safetensors import COPY_BYTES, MLX_DTYPES, Header, TensorInfo, open_plain, read_header

INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 32 << 20  # some 200,000 tensors
FEW_FILES = 256  # what a process opens beside a model's files
UNREAD = {  # weights in other formats: how their files are called, and what they are
    **dict.fromkeys(("*.bin", "*.pt", "*.pth", "*.pkl"), "pickles, which are never read"),
    "*.gguf": "GGUF, which is packed for llama.cpp; take the folder that it was made from",
    "*.onnx": "ONNX, which is a graph for inference",
    "consolidated*.safetensors": "named as Mistral's own tools have them; take the folder for transformers",
}

Build = Callable[[], nn.Module]  # builds mlx-lm's model lazily; called anew whenever a pristine one is needed


@dataclass(frozen=True)
class ModelFolder:
    """The weight files of a folder by name, and every tensor of the model as stored."""

    path: Path
    files: Mapping[str, Header]
    tensors: Mapping[str, TensorInfo]

    def load(self) -> dict[str, mx.array]:
        """All tensors as lazy arrays, named and shaped as stored; to be evaluated by the same thread only."""
        _allow_open(len(self.files) + FEW_FILES)
        arrays: dict[str, mx.array] = {}
        for name in self.files:
            file = self.path / name
            try:
                loaded = mx.load(str(file), format="safetensors")
                assert isinstance(loaded, dict)
            except Exception as error:  # mlx raises several kinds; a checked header makes all of them rare
                raise UserError(f"{file}: mlx cannot read it: {str(error)[:160]}") from None
            arrays.update(
                (k, v) for k, v in loaded.items() if k in self.tensors and self.tensors[k].file == file
            )
        absent = self.tensors.keys() - arrays.keys()
        if absent:
            raise UserError(f"{self.path}: mlx cannot read tensor {min(absent)!a}; fetch the model again")
        return arrays

    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor, as `model.build.Stored` wants them, and fit for JSON."""
        return {name: (MLX_DTYPES[info.code], info.shape) for name, info in self.tensors.items()}


def _allow_open(count: int) -> None:
    """Raise how many files this process may open: MLX keeps one open until its arrays are read, macOS allows 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != soft < count:
        most = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def has_weights(path: Path) -> bool:
    """True if a folder has weight files or an index; for a random initialisation config.json is enough."""
    return (path / INDEX_NAME).exists() or any(True for _ in path.glob("model*.safetensors"))


def open_folder(path: Path) -> ModelFolder:
    """Read and check all headers of a folder; a missing, damaged or contradictory file is a UserError."""
    mapping = _read_index(path)
    if mapping is None:
        names = sorted(f.name for f in path.glob("model*.safetensors"))
        if not names:
            unread = (why for pattern, why in UNREAD.items() if any(path.glob(pattern)))
            reason = next((f"its weights are {why}; " for why in unread), "")
            raise UserError(
                f"{path}: no model*.safetensors found; {reason}model.path needs safetensors files"
            )
    else:
        names = sorted(set(mapping.values()))
    files: dict[str, Header] = {}
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        files[name] = read_header(path / name)
        for info in files[name].tensors:
            if mapping is not None and mapping.get(info.name) != name:
                continue
            if info.name in tensors:
                raise UserError(
                    f"{path}: tensor {info.name!a} stands in {tensors[info.name].file.name} and {name}"
                )
            tensors[info.name] = info
    for tensor, file in (mapping or {}).items():
        if tensor not in tensors:
            raise UserError(f"{path / INDEX_NAME}: tensor {tensor!a} is not in {file}; fetch the model again")
    return ModelFolder(path, files, tensors)


def stored_if_whole(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """`ModelFolder.stored` of a folder that has all its weights; None for one that is not there yet, or damaged."""
    try:
        return open_folder(path).stored() if has_weights(path) else None
    except UserError:
        return None


def model_digest(path: Path, *, contents: bool = False) -> str:
    """An identity of a model folder: SHA-256 (hex) over config.json and each file's name, size, header.

    Equal digests mean the same configuration, tensor names, shapes, dtypes and layout on two machines. The
    data itself is read only if `contents` says so (a second or two per GB): else a flipped bit in a weight, or
    two fine-tunings of one model that were saved alike, are not seen.
    """
    digest = hashlib.sha256()

    def add(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "little") + part)

    try:
        with open_plain(path / "config.json") as file:
            add(file.read())
    except OSError as error:
        raise UserError(f"{path / 'config.json'}: {error.strerror}") from None
    for name, header in sorted(open_folder(path).files.items()):
        add(name.encode())
        add(header.file_bytes.to_bytes(8, "little"))
        add(header.raw)
        if contents:
            with open_plain(path / name) as file:
                for piece in iter(lambda: file.read(COPY_BYTES), b""):
                    digest.update(piece)
    return digest.hexdigest()


def _read_index(path: Path) -> dict[str, str] | None:
    file = path / INDEX_NAME
    if not file.exists():
        return None
    try:
        with open_plain(file) as stream:
            text = stream.read(MAX_INDEX_BYTES + 1)
        if len(text) > MAX_INDEX_BYTES:
            raise ValueError(f"more than {MAX_INDEX_BYTES} bytes")
        index: Any = json.loads(text.decode("utf-8"))
        mapping = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(mapping, dict) or not mapping:
            raise ValueError("no weight_map")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; fetch the model again") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged index ({str(error)[:160]}); fetch the model again") from None
    for tensor, name in mapping.items():
        if not isinstance(name, str) or not is_plain_name(name) or not name.endswith(".safetensors"):
            raise UserError(
                f"{file}: tensor {tensor[:80]!a} is in {str(name)[:80]!a}: needs a plain *.safetensors name"
            )
    return mapping


def is_plain_name(name: str) -> bool:
    """True for a file's bare name: no folder, no parent, nothing unprintable."""
    return name.isprintable() and not set(name) & {"/", "\\"} and name not in ("", ".", "..")
