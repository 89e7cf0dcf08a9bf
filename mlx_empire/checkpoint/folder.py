"""A Hugging Face folder's weights as its safetensors headers describe them; which files belong to the model.

With `model.safetensors.index.json` its map decides, else every `model*.safetensors`. Names in the index are
plain file names; the files themselves may be symbolic links, as in Hugging Face's cache. Pickles are never
read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_empire.checkpoint.tensorfile import COPY_BYTES, DTYPES, Header, TensorInfo, open_plain, read_header
from mlx_empire.errors import UserError
from mlx_empire.plan.config import HEADS, TIE
from mlx_empire.plan.foreign import reason_of
from mlx_empire.plan.model import ModelSpec

INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 32 << 20  # some 200,000 tensors
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")

Stored = Mapping[
    str, tuple[str, Sequence[int]]
]  # name -> (dtype code, shape), as `ModelFolder.stored` gives it
Build = Callable[[], nn.Module]  # builds mlx-lm's model lazily; called anew whenever a pristine one is needed


@dataclass(frozen=True)
class ModelFolder:
    """The weight files of a folder by name, and every tensor of the model as stored."""

    path: Path
    files: Mapping[str, Header]
    tensors: Mapping[str, TensorInfo]

    def load(self) -> dict[str, mx.array]:
        """All tensors as lazy arrays, named and shaped as stored; to be evaluated by the same thread only."""
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
        """Name -> (dtype code, shape) of every tensor: all that `settle` needs, and fit for JSON."""
        return {name: (info.code, info.shape) for name, info in self.tensors.items()}


def has_weights(path: Path) -> bool:
    """True if a folder has weight files or an index; for a random initialisation config.json is enough."""
    return (path / INDEX_NAME).exists() or any(True for _ in path.glob("model*.safetensors"))


def open_folder(path: Path) -> ModelFolder:
    """Read and check all headers of a folder; a missing, damaged or contradictory file is a UserError."""
    mapping = _read_index(path)
    if mapping is None:
        names = sorted(f.name for f in path.glob("model*.safetensors"))
        if not names:
            bait = any(True for pattern in PICKLES for _ in path.glob(pattern))
            reason = "its weights are pickles, which are never read; " if bait else ""
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


def sanitize(model: nn.Module, weights: dict[str, mx.array], where: Path | str) -> dict[str, mx.array]:
    """The model's own renaming of stored tensors to mlx-lm's, on lazy arrays; its failure is a UserError."""
    if not hasattr(model, "sanitize"):
        return weights
    try:
        return dict(model.sanitize(weights))
    except Exception as error:  # foreign code on foreign names: usually a KeyError for a missing tensor
        raise UserError(
            f"{where}: mlx-lm cannot map its tensors to the model ({reason_of(error)}); is it complete?"
        ) from None


def stand_ins(stored: Stored) -> dict[str, mx.array]:
    """Lazy zeros with the names, shapes and (floating) dtypes of tensors; no file is opened."""
    return {
        name: mx.zeros(tuple(shape), getattr(mx, DTYPES[code]) if code in DTYPES else mx.uint8)
        for name, (code, shape) in stored.items()
    }


def settle(model: nn.Module, stored: Stored, where: Path | str) -> frozenset[str]:
    """Let the model that will be described and trained see a folder's tensor names; returns mlx-lm's for them.

    A few families (gemma3) tie their head only when `sanitize` finds none among the weights, and can do so
    once: the sources and the writer take the plain `build`. Works on names and shapes alone and on lazy zeros,
    so it costs nothing and opens no file.
    """
    return frozenset(sanitize(model, stand_ins(stored), where))


def refuse_dropped_head(spec: ModelSpec, stored: Stored, where: Path | str) -> None:
    """UserError where the folder has a head of its own, says that it is one, and mlx-lm's model has none for it."""
    head = next((name for name in stored if name.endswith(HEADS)), None)
    vocabulary = spec.text_config.get("vocab_size")
    matrices = [t for t in spec.units[0].tensors if len(t.shape) == 2 and t.shape[0] == vocabulary]
    if head is not None and spec.text_config.get(TIE) is False and len(matrices) == 1:
        raise UserError(
            f"{where}: {head} is stored and {TIE} is false, but mlx-lm's {spec.family} has no head of its own; "
            f"it would be dropped (if it only repeats the embedding, write {TIE}: true into config.json)"
        )


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
