"""A result that no longer changes: a manifest with a digest of every file, and a folder that cannot be written.

`FROZEN.json` in the folder lists every other file with its bytes and SHA-256; the digest of the folder is the SHA-256
of that list. A recipe that names it (`model.base_digest`) is trained on exactly these files, or on nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_empire.disk import sync_folder
from mlx_empire.errors import UserError
from mlx_empire.formats.safetensors import open_plain
from mlx_empire.formats.staging import disk_errors, write_json

MANIFEST_NAME = "FROZEN.json"
PIECE_BYTES = 16 << 20
MAX_MANIFEST_BYTES = 16 << 20


def seal_folder(folder: Path, about: Mapping[str, Any]) -> str:
    """Write the manifest with `about` (JSON) in it, take the right to write away, and return the folder's digest."""
    files = {str(path.relative_to(folder)): bytes_and_digest(path) for path in _files(folder)}
    digest = digest_of_list(files)
    with disk_errors(folder):
        write_json(folder / MANIFEST_NAME, {"digest": digest, "files": files, **about})
        sync_folder(folder)
        for path in sorted(folder.rglob("*"), reverse=True):
            path.chmod(0o500 if path.is_dir() else 0o400)
        folder.chmod(0o500)
    return digest


def unseal(folder: Path) -> None:
    """Take back what `seal_folder` did, wholly or in part. A link, or a folder that is not sealed, stays."""
    if folder.is_symlink() or not is_sealed(folder):
        return
    with disk_errors(folder):
        folder.chmod(0o700)
        for path in sorted(folder.rglob("*")):  # a folder before what lies in it
            path.chmod(0o700 if path.is_dir() else 0o600)
        (folder / MANIFEST_NAME).unlink(missing_ok=True)


def is_sealed(folder: Path) -> bool:
    """Whether a manifest lies in the folder, of whatever kind."""
    return (folder / MANIFEST_NAME).exists()


def sealed_digest(folder: Path) -> str | None:
    """The digest that a folder's manifest names; None where it is not frozen. Nothing else is read."""
    if not is_sealed(folder):
        return None
    return str(_manifest(folder)["digest"])


def check_sealed(folder: Path, digest: str) -> None:
    """UserError unless `folder` is frozen under `digest` and every file of it is as it was, naming what is not."""
    if not is_sealed(folder):
        raise UserError(
            f"model.base_digest: {folder} is not frozen ({MANIFEST_NAME} is missing); leave the digest out"
        )
    manifest = _manifest(folder)
    files = manifest["files"]
    if digest_of_list(files) != manifest["digest"]:
        raise UserError(f"{folder / MANIFEST_NAME}: it was changed: its list of files has another digest")
    if manifest["digest"] != digest:
        raise UserError(
            f"model.base_digest: {digest[:20]}... is asked for, but {folder} is frozen as "
            f"{manifest['digest'][:20]}...; this is another base"
        )
    present = {str(path.relative_to(folder)) for path in _files(folder)}
    for name in sorted(files.keys() - present):
        raise UserError(f"{folder / name}: this file of the frozen base is missing")
    for name in sorted(present - files.keys()):
        raise UserError(f"{folder / name}: this file is no part of the frozen base; take it away")
    for name, expected in sorted(files.items()):
        found = bytes_and_digest(folder / name)
        if found != expected:
            raise UserError(
                f"{folder / name}: changed since the base was frozen: SHA-256 {found['sha256'][:16]}..., "
                f"expected {expected['sha256'][:16]}..."
            )


def digest_of_list(files: Mapping[str, Any]) -> str:
    """The digest of a list of files."""
    text = json.dumps(files, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _files(folder: Path) -> Iterator[Path]:
    """Every file but the manifest, also in sub-folders."""
    return (p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / MANIFEST_NAME)


def bytes_and_digest(path: Path) -> dict[str, Any]:
    """What a file's entry in a manifest is: `bytes` and `sha256`. UserError."""
    sha, size = hashlib.sha256(), 0
    try:
        with open_plain(path) as file:
            while piece := file.read(PIECE_BYTES):
                sha.update(piece)
                size += len(piece)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return {"bytes": size, "sha256": sha.hexdigest()}


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    try:
        with open_plain(path) as file:
            raw = json.loads(file.read(MAX_MANIFEST_BYTES))
        if not isinstance(raw["digest"], str) or not isinstance(raw["files"], dict):
            raise TypeError("no digest and files")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({str(error)[:80]})") from None
    return dict(raw)
