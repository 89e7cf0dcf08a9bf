"""Decides where tokenised data is kept between runs, under which key, and when a kept copy is believed.

An entry is a folder named by its key: one `.npy` file per array (read as memory maps, so a set larger than
memory is no problem) and `index.json` with a SHA-256 of each. It appears whole and on the disk, by one rename; an entry
in which anything does not match is built again, and what a kill left half made is removed by the next build. Of
processes that want the same entry one builds it and the others wait (`disk.building`); where a shared disk's locks do
not reach other machines the first rename wins. Large files that did not change are not hashed again (`digests`), but
where a run goes on.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mlx_empire.data.digests import noted_digest
from mlx_empire.data.rows import Table
from mlx_empire.data.stream import HEADER_BYTES
from mlx_empire.disk import create_private, put_folder, sync_file, sync_folder

BYTES_PER_TOKEN = 5  # an id, and whether it is a target
CACHED_PER_BYTE = BYTES_PER_TOKEN / 2  # no fewer than two bytes of data a token
DIGESTED_BYTES = 1 << 20  # at once
TOKENIZER_FILES = (
    "*token*",
    "*vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*chat_template*",
    "*chat_templates/*",
    "config.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class CacheEntry:
    """The tables of the splits by name, the sentences about them, and a digest of all array contents."""

    tables: Mapping[str, Table]
    report: tuple[str, ...]
    digest: str


def cache_folder() -> Path:
    """$MLX_EMPIRE_CACHE, or ~/.cache/mlx_empire."""
    return Path(os.environ.get("MLX_EMPIRE_CACHE") or "~/.cache/mlx_empire").expanduser()


def tokens_folder() -> Path:
    """Where the entries lie, each in a folder called by its key."""
    return cache_folder() / "tokens"


def cached_bytes(data: int) -> int:
    """What the tokens of so many bytes of data take, at most, as a rule."""
    return int(CACHED_PER_BYTE * data)


def tokens_beside(data: int, *, copied: bool) -> int:
    """The same while they are written; `copied`: they are laid out anew (packing, or some are held out)."""
    return cached_bytes(data) * (2 if copied else 1)


def notes_folder() -> Path:
    """Where it is noted what digests large files had."""
    return cache_folder() / "digests"


def cache_key(
    settings: Mapping[str, Any],
    files: Iterable[Path],
    tokenizer_folder: Path | None,
    *,
    thorough: bool = True,
) -> str:
    """SHA-256 (hex) over the settings, the bytes of data and tokenizer files, and the code that reads them.

    File names other than the tokenizer's do not matter: the same data elsewhere is the same entry. `thorough`: every
    byte is read, also of files that have not changed since they were.
    """
    notes = notes_folder()
    own = sorted(Path(__file__).parent.glob("*.py"))
    described: dict[str, Any] = {
        "settings": dict(settings),
        "data": [
            noted_digest("file", file, notes, partial(file_digest, file), thorough=thorough) for file in files
        ],
        "code": [file_digest(file) for file in own],
    }
    if tokenizer_folder is not None:
        found = {
            file for pattern in TOKENIZER_FILES for file in tokenizer_folder.glob(pattern) if file.is_file()
        }
        described["tokenizer"] = [(file.name, file_digest(file)) for file in sorted(found)]
        described["versions"] = [version(name) for name in ("mlx-lm", "transformers", "tokenizers")]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def file_digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def make_entry(tables: Mapping[str, Table], report: Iterable[str]) -> CacheEntry:
    """An entry in memory, with the same digest that it has once it is stored."""
    digests = {name: _array_digest(array) for name, array in _named(tables).items()}
    return CacheEntry(tables, tuple(report), _join(digests))


def load_entry(folder: Path, *, thorough: bool = True) -> CacheEntry | None:
    """Read an entry as memory maps, or None where it is missing or damaged in any way; `thorough` as in `cache_key`."""
    notes = notes_folder()
    try:
        index = json.loads((folder / "index.json").read_text("utf-8"))
        content = index["content"]
        if index["sha256"] != _text_digest(content):
            return None
        tables: dict[str, dict[str, np.ndarray]] = {}
        for name, digest in content["arrays"].items():
            file = folder / f"{name}.npy"
            array = np.load(file, mmap_mode="r", allow_pickle=False)
            read = partial(_file_digest, file, array, array.offset)
            if noted_digest("array", file, notes, read, thorough=thorough, ours=True) != digest:
                return None
            split, field = name.split(".")
            tables.setdefault(split, {})[field] = array
        return CacheEntry(
            {split: Table(**arrays) for split, arrays in tables.items()},
            tuple(content["report"]),
            _join(content["arrays"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None


def publish_entry(place: Path, folder: Path, tables: Mapping[str, Table], report: Iterable[str]) -> None:
    """Make what lies in `place` the entry `folder`, files 0600: the large arrays are there, the others are written.
    Errors: OSError (disk full, or another process was first)."""
    digests = {}
    for name, array in _named(tables).items():
        file = place / f"{name}.npy"
        if not file.exists():
            with create_private(file) as made:
                np.save(made, array, allow_pickle=False)
        digests[name] = _file_digest(file, array, HEADER_BYTES)
        with file.open("rb") as written:  # a digest that is noted is believed, also after a power cut
            sync_file(written)
    content = {"arrays": digests, "report": list(report)}
    with create_private(place / "index.json") as made:
        made.write(json.dumps({"content": content, "sha256": _text_digest(content)}).encode())
        sync_file(made)
    sync_folder(place)
    if put_folder(place, folder, lambda: load_entry(folder) is not None):
        for name, digest in digests.items():  # nobody has to read them again to know
            noted = partial(str, digest)
            noted_digest("array", folder / f"{name}.npy", notes_folder(), noted, thorough=True, ours=True)


def _named(tables: Mapping[str, Table]) -> dict[str, np.ndarray]:
    return {
        f"{split}.{name}": array for split, table in tables.items() for name, array in table.arrays().items()
    }


def _array_digest(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _file_digest(file: Path, array: np.ndarray, offset: int) -> str:
    """The same of an array that lies in `file` from byte `offset` on: read, for pages of a map count as memory."""
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    with file.open("rb") as content:
        content.seek(offset)
        while part := content.read(DIGESTED_BYTES):
            digest.update(part)
    return digest.hexdigest()


def _text_digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _join(digests: Mapping[str, str]) -> str:
    return _text_digest(dict(sorted(digests.items())))
