"""Decides when a file's digest is believed without reading it again: gigabytes are hashed once, not at each start.

A note, named by what was digested and where it lies, holds the file's size, times and inode, and the digest. It
counts while all of them are as they were. A file that somebody else changed moments before it was read gets no note,
for one more change might leave the same times. Who must be sure reads every byte all the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mlx_empire.disk import create_private

LEAST_BYTES = 2**24  # smaller files are hashed in no time
SETTLED_SECONDS = 2.0  # the coarsest clocks of file systems


def noted_digest(
    kind: str, file: Path, notes: Path, compute: Callable[[], str], *, thorough: bool, ours: bool = False
) -> str:
    """What `compute` says of `file`, or said when the file was as it is now, by a note in the folder `notes`.

    `kind`: what is computed. `thorough`: compute in any case. `ours`: nobody changes the file in place. OSError where
    there is no such file.
    """
    state = file_state(file)
    if state[0] < LEAST_BYTES:
        return compute()
    name = hashlib.sha256(f"{kind} {file.absolute()}".encode()).hexdigest()[:32]
    note = notes / f"{name}.json"
    if not thorough:
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(note.read_text("utf-8"))
            if known["state"] == state:
                return str(known["digest"])
    digest = compute()
    settled = ours or time.time_ns() - max(state[1:3]) > SETTLED_SECONDS * 1e9
    if settled and file_state(file) == state:
        with suppress(OSError):
            _write(note, json.dumps({"file": str(file.absolute()), "state": state, "digest": digest}))
    return digest


def file_state(file: Path) -> list[int]:
    """Size, times of the last changes of content and of anything, inode."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _write(note: Path, text: str) -> None:
    note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = note.with_name(f".{note.name}-{os.getpid()}")  # ranks that share a home write the same note
    draft.unlink(missing_ok=True)
    with create_private(draft) as file:
        file.write(text.encode())
    os.replace(draft, note)
