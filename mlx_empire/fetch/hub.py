"""What the Hub has of a model, what of it is here, and how it gets here: by huggingface_hub, then checked by us.

Decides which files are fetched (what training reads and results carry; no code, no pickles, no second copy of the
weights), that nothing begins without room for all of it, and that a file is believed only by its digest: SHA-256 as the
Hub has it for large files, git's SHA-1 for the small ones. huggingface_hub goes on within a file whose connection is
cut; a file that was not whole when the process ended is fetched anew.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mlx_empire.disk import free_bytes, open_private, with_headroom
from mlx_empire.errors import DamagedError, DoesNotFitError, NoRoomError, UnreachableError, UserError
from mlx_empire.formats.fetched import RECORD, Record, differing, fetch_record, write_record
from mlx_empire.formats.hf_folder import INDEX_NAME, is_plain_name
from mlx_empire.formats.staging import NAMED_TEMPLATES, SIDE_FILES
from mlx_empire.model.config import BESIDE
from mlx_empire.recipe.text import one_line
from mlx_empire.sizes import amount

ENDPOINT = "HF_ENDPOINT"
PUBLIC_HUB = "https://huggingface.co"
CLIENTS = Path(".cache") / "huggingface"  # in the folder: huggingface_hub's own notes
WANTED = ("config.json", BESIDE, INDEX_NAME, "model*.safetensors", *SIDE_FILES)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Hub:
    """A model of the Hub at one commit: `record` as FETCHED.json will have it; `gated`: a licence must be accepted."""

    repository: str
    endpoint: str
    folder: Path
    record: Record
    gated: bool

    @classmethod
    def of(cls, source: str, folder: Path, environment: Mapping[str, str]) -> Hub:
        """Ask the Hub what `source` (owner/name@revision) is. UserError, UnreachableError."""
        repository, _, revision = source.partition("@")
        endpoint = environment.get(ENDPOINT) or PUBLIC_HUB
        with _in_one_line(source, f"{endpoint}/{repository}"):
            info = HfApi(endpoint=endpoint).model_info(repository, revision=revision, files_metadata=True)
        files = {
            one.rfilename: {"bytes": one.lfs.size, "sha256": one.lfs.sha256}
            if one.lfs is not None
            else {"bytes": one.size, "git_sha1": one.blob_id}
            for one in info.siblings or ()
            if wanted(one.rfilename)
        }
        if not any(name.endswith(".safetensors") for name in files) or "config.json" not in files:
            raise UserError(
                f"model.source: {source}: has no config.json with model*.safetensors; name another model or revision"
            )
        card: Any = info.card_data
        licence = None if card is None else card.get("license_name") or card.get("license")
        record = {
            "source": source,
            "revision": info.sha,
            "licence": None if licence is None else one_line(str(licence)[:80]),
            "files": dict(sorted(files.items())),
        }
        return cls(repository, endpoint, folder, record, bool(info.gated))

    @property
    def page(self) -> str:
        """Where the model's licence can be read and accepted."""
        return f"{self.endpoint}/{self.repository}"

    def announce(self, say: Say) -> None:
        """What will be fetched, how large it is, what is free, and under which licence."""
        files = self.record["files"]
        total, needed = sum(one["bytes"] for one in files.values()), self.needed_bytes()
        say(
            f"{self.record['source']} (commit {self.record['revision'][:12]}): {len(files)} files, {amount(total)}"
        )
        say(f"licence: {self.record['licence'] or 'not named'}, see {self.page}")
        say(f"to {self.folder}: {amount(needed)} to fetch, {amount(self.free_bytes())} are free there")

    def needed_bytes(self) -> int:
        """Bytes that are not in the folder yet, by the files' sizes."""
        return sum(
            one["bytes"]
            for name, one in self.record["files"].items()
            if not _has_size(self.folder / name, one["bytes"])
        )

    def free_bytes(self) -> int:
        """Bytes that are free for the folder, with what a fetch that was killed left in it, which will go."""
        return free_bytes(self.folder) + sum(path.stat().st_size for path in self._leftovers())

    def require_room(self) -> None:
        """DoesNotFitError unless all that is missing fits on the folder's disk."""
        needed, free = self.needed_bytes(), self.free_bytes()
        if needed and with_headroom(needed) > free:
            raise DoesNotFitError(
                f"model.path: {self.folder}: {amount(needed)} are still to fetch, and {amount(free)} are free on its "
                "disk; make room, or name a model.path on another disk"
            )

    def download(self) -> None:
        """Fetch what is missing; what an earlier revision had and this one has not goes. UserError, UnreachableError,
        NoRoomError."""
        kept = fetch_record(self.folder)
        with _in_one_line(str(self.record["source"]), self.page), _alone(self.folder):
            for path in self._leftovers():
                path.unlink()
            for name in self._others():
                if kept is None or name not in kept["files"]:
                    raise UserError(
                        f"{self.folder / name}: is not of {self.record['source']}; move it away, or name another "
                        "model.path"
                    )
            if kept is not None and kept != self.record:
                (self.folder / RECORD).unlink()  # until all of it is checked it is what it was no more
                for name in self._others():
                    (self.folder / name).unlink()
            snapshot_download(
                self.repository,
                revision=str(self.record["revision"]),
                local_dir=self.folder,
                allow_patterns=list(self.record["files"]),
                endpoint=self.endpoint,
            )

    def _leftovers(self) -> list[Path]:
        """Parts of files of a process that was killed: each process begins its own."""
        return list((self.folder / CLIENTS / "download").rglob("*.incomplete"))

    def _others(self) -> list[str]:
        """Files in the folder that a training would read and that the model does not have."""
        there = (
            str(path.relative_to(self.folder)) for path in sorted(self.folder.rglob("*")) if path.is_file()
        )
        return [name for name in there if wanted(name) and name not in self.record["files"]]

    def check(self, say: Say) -> None:
        """Compare every file with what the Hub says, and record it. DamagedError; a wrong file is taken away."""
        total = sum(one["bytes"] for one in self.record["files"].values())
        say(f"checking {len(self.record['files'])} files, for which {amount(total)} are read")
        wrong = differing(self.folder, self.record["files"])
        for name in wrong:
            (self.folder / name).unlink(missing_ok=True)
        if wrong:
            name, why = next(iter(wrong.items()))
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise DamagedError(
                f"{self.folder / name}: {why}, as {self.page} says{more}; removed, so run the same command again"
            )
        write_record(self.folder, self.record)
        say(f"{self.folder}: whole, as {RECORD} there says")


def wanted(name: str) -> bool:
    """Whether a file of a repository is fetched: what is read or carried along, in the folder's own place."""
    folder, _, file = name.rpartition("/")
    if folder:
        return folder == NAMED_TEMPLATES and is_plain_name(file) and file.endswith(".jinja")
    return is_plain_name(name) and any(fnmatchcase(name, pattern) for pattern in WANTED)


def _has_size(path: Path, nbytes: int) -> bool:
    try:
        return path.stat().st_size == nbytes
    except OSError:
        return False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make the folder and hold it: UserError where another process fetches into it."""
    (folder / CLIENTS).mkdir(parents=True, exist_ok=True)
    descriptor = open_private(folder / CLIENTS / "fetching.lock")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{folder}: another process fetches into it; wait until it has ended") from None
    finally:
        os.close(descriptor)


@contextmanager
def _in_one_line(source: str, page: str) -> Iterator[None]:
    """What the Hub's client raises, as an error with its remedy."""
    try:
        yield
    except GatedRepoError:  # before RepositoryNotFoundError, which it is too
        raise UserError(
            f"model.source: {source}: its licence must be accepted first: see {page}, then `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"model.source: {source}: there is no such revision; see {page}/commits/main"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"model.source: {source}: there is no such model, or it is private; see {page}, or `hf auth login`"
        ) from None
    except (httpx2.HTTPError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = one_line(" ".join(str(error).split())[:160]) or type(error).__name__
        raise UnreachableError(
            f"model.source: {source}: the Hub was not reached, or not to the end ({reason}); "
            "run the same command again, which keeps what is whole"
        ) from None
    except OSError as error:
        kind = NoRoomError if error.errno in (errno.ENOSPC, errno.EDQUOT) else UnreachableError
        reason = one_line(" ".join(str(error.strerror or error).split())[:160])
        raise kind(
            f"model.source: {source}: cannot be fetched ({reason}); run the same command again"
        ) from None
