"""Which files besides the weights an exported folder gets: an allow-list of names, plain files only.

Nothing that is or carries code (`*.py`, pickles) is on the list. A symbolic link is followed only where
Hugging Face's own cache has one: from a snapshot to a blob of the same repository.
"""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_empire.formats.safetensors import open_plain
from mlx_empire.model.quantize import unpacked
from mlx_empire.private_files import create_private, sync_file

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "qwen.tiktoken",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
)
CODE = ("*.py", "*.bin", "*.pt", "*.pth", "*.pkl")
DTYPE_KEYS = ("torch_dtype", "dtype")


def copy_side_files(source: Path, target: Path) -> tuple[list[str], list[str]]:
    """Copy the allowed files that are there; returns their names, and a note for each thing left behind."""
    copied, notes = [], []
    for name in SIDE_FILES:
        file = source / name
        if not (file.exists() or file.is_symlink()):
            continue
        if not _is_plain(file):
            notes.append(f"{file} was not copied: it is not a plain file of this folder")
            continue
        with open_plain(file) as reader, create_private(target / name) as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
            sync_file(writer)
        copied.append(name)
    code = sorted(f.name for pattern in CODE for f in source.glob(pattern))
    if code:
        notes.append(f"code and pickles of {source} were not copied: {', '.join(code[:5])}")
    return copied, notes


def stored_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The original configuration with the dtype that is now stored, also in its language model's part, unpacked."""
    result = unpacked(config)
    text = result.get("text_config")
    if isinstance(text, Mapping):
        result["text_config"] = {key: dtype if key in DTYPE_KEYS else value for key, value in text.items()}
    result.update(dict.fromkeys([key for key in DTYPE_KEYS if key in result] or ["torch_dtype"], dtype))
    return result


def write_json(path: Path, value: Any) -> None:
    """Write a new JSON file (mode 0600, fsynced)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a new text file (mode 0600, fsynced)."""
    with create_private(path) as file:
        file.write(text.encode("utf-8", "surrogatepass"))
        sync_file(file)


def _is_plain(file: Path) -> bool:
    if file.is_symlink():
        blobs = file.parent.parent.parent / "blobs"
        resolved = file.resolve()
        inside = file.parent.parent.name == "snapshots" and resolved.parent == blobs.resolve()
        return inside and resolved.is_file()
    return stat.S_ISREG(file.lstat().st_mode)
