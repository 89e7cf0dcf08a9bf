"""Decides how a hostfile is read: Open MPI's own lines, and in their comments what Open MPI need not know.

king.local       slots=1  # role=king    memory=512GiB
soldier-1.local  slots=1  # role=soldier memory=256GiB limit=208GiB link=1.1GB/s chip=M3-Ultra

Grammar of a line: `[user@]host [slots=N] [max_slots=N] [port=N] [# name=value ...]`, as in Open MPI 5; a host
without slots has one. Comments on a line of their own are free text; in a comment after a host, words with
`=` must be known annotations. What mpirun itself would refuse (a byte-order mark, Windows line ends) is
refused here too, in one line that says how to mend it.
"""

import difflib
import re
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from mlx_empire.errors import UserError
from mlx_empire.recipe.text import one_line, printable, quote, read_small_text
from mlx_empire.sizes import GIB

MAX_BYTES = 256 * 1024
MAX_SLOTS = 4096
ROLES = ("king", "soldier")

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_RATES = {"": 10**9, "GB/s": 10**9, "MB/s": 10**6}
_HOST = re.compile(r"(?:([A-Za-z0-9_][A-Za-z0-9._-]*)@)?([A-Za-z0-9](?:[A-Za-z0-9._:-]{0,252}))", re.ASCII)
_QUANTITY = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)([A-Za-z/]*)", re.ASCII)
_SLOT_WORDS = {"slots": "slots", "max_slots": "max_slots", "max-slots": "max_slots", "port": "port"}
_ANNOTATIONS = ("role", "memory", "limit", "link", "chip", "disk")

# What a plan lets the GPU use on the machines of an empire: a limit that is raised first (`plan.wired_limit`).
_KNOWN_LIMITS = {512 * GIB: 464 * GIB, 256 * GIB: 208 * GIB}


def macos_limit(memory_bytes: int) -> int:
    """Bytes of a Mac's memory that macOS lets the GPU use until somebody says more."""
    return memory_bytes * 3 // 4


def default_limit(memory_bytes: int) -> int:
    """Bytes the GPU may use on a machine of which the hostfile says no more than its memory."""
    return _KNOWN_LIMITS.get(memory_bytes, macos_limit(memory_bytes))


@dataclass(frozen=True)
class Host:
    """One line of a hostfile; None is what the line does not say. Sizes in bytes: `limit_bytes` for the GPU,
    `disk_bytes` what a run may use of the disk.
    """

    name: str
    slots: int = 1
    role: str | None = None
    memory_bytes: int | None = None
    limit_bytes: int | None = None
    link_bytes_per_second: float | None = None
    chip: str | None = None
    disk_bytes: int | None = None
    line: int = field(default=0, compare=False)
    user: str | None = field(default=None, compare=False)  # how ssh reaches it
    port: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Node:
    """What one rank may use. Sizes in bytes; `limit_bytes` is what fits on the GPU (or stands in for it),
    `disk_bytes` what the hostfile says of the machine's disk.

    `compiles`: what its GPU's kernels are compiled for and by, None where no GPU was asked. `measured`: whether the
    machine itself was asked; else the hostfile alone says what it has.
    """

    name: str
    slots: int
    role: str | None
    memory_bytes: int
    limit_bytes: int
    link_bytes_per_second: float | None = None
    chip: str | None = None
    disk_bytes: int | None = None
    compiles: str | None = None
    measured: bool = field(default=True, compare=False)


@dataclass(frozen=True)
class Cluster:
    """The hosts of a hostfile in its order; `source` is the file's path."""

    nodes: tuple[Host, ...]
    source: str


def load_hostfile(path: Path) -> Cluster:
    """The cluster that the hostfile `path` describes.

    Where a line has `memory` and no `limit`, the limit is `default_limit`. Raises UserError, one line
    "path:line: host: ... remedy", for anything malformed.
    """
    remedy = "give the path of a hostfile, such as hosts/local.txt"
    text = read_small_text(path, "hostfile", MAX_BYTES, remedy)
    return parse_hostfile(text, one_line(str(path)))


def parse_hostfile(text: str, source: str) -> Cluster:
    """The cluster in the hostfile's `text`; `source` begins every message. Raises UserError."""
    if text.startswith("\ufeff"):
        raise UserError(
            f"{source}:1: begins with a byte-order mark, which mpirun refuses; save as plain UTF-8"
        )
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{source}:{number}"
        if line.endswith("\r"):
            raise UserError(f"{where}: Windows line end, which mpirun refuses; save with Unix line ends (LF)")
        if not printable(line.replace("\t", " ")):
            raise UserError(f"{where}: {quote(line)} contains a control character; remove it")
        host = _parse_line(line, where, number)
        if host is None:
            continue
        twin = hosts.setdefault(host.name.lower(), host)
        if twin is not host:
            raise UserError(
                f"{where}: {host.name} stands on line {twin.line} already; "
                "list a machine once and give it more slots"
            )
    if not hosts:
        raise UserError(
            f"{source}: no hosts in this hostfile; write one line per machine, such as localhost slots=2"
        )
    return Cluster(tuple(hosts.values()), source)


def _parse_line(line: str, where: str, number: int) -> Host | None:
    """The host on one line, or None for a line that is blank or all comment."""
    words, _, comment = (re.sub(r"\s*=\s*", "=", part) for part in line.partition("#"))
    name, *settings = words.split() or [""]
    if not name:
        return None
    match = _HOST.fullmatch(name)
    if match is None:
        raise UserError(f"{where}: {quote(name)} is not a host name; use letters, digits, dots and hyphens")
    where = f"{where}: {name}"
    slots, port = _slots(settings, where)
    notes = _annotations(comment, where)
    memory = _size(notes, "memory", where)
    limit = _size(notes, "limit", where)
    if memory is not None and limit is None:
        limit = default_limit(memory)
    if memory is not None and limit is not None and limit > memory:
        raise UserError(
            f"{where}: limit={notes['limit']} is more than memory={notes['memory']}; lower limit="
        )
    role = notes.get("role")
    if role is not None and role not in ROLES:
        raise UserError(f"{where}: role={one_line(role[:40])} is not a role; use {_nearest(role, ROLES)}")
    link = _rate(notes, where)
    disk = _size(notes, "disk", where)
    return Host(match[2], slots, role, memory, limit, link, notes.get("chip"), disk, number, match[1], port)


def _slots(settings: list[str], where: str) -> tuple[int, int | None]:
    """The number of ranks that a host takes and ssh's port, from `slots=N max_slots=N port=N`."""
    found: dict[str, int] = {}
    for word in settings:
        key, equals, value = word.partition("=")
        if not equals or key not in _SLOT_WORDS:
            hint = f"; did you mean '# {word}'?" if key in _ANNOTATIONS else ""
            raise UserError(
                f"{where}: mpirun does not know {quote(word)} here; use slots=N or max_slots=N{hint}"
            )
        kind = _SLOT_WORDS[key]
        limit = 65535 if kind == "port" else MAX_SLOTS
        if not re.fullmatch("[0-9]{1,6}", value, re.ASCII) or not 1 <= int(value) <= limit:
            raise UserError(f"{where}: {key}={one_line(value[:40])} is not a whole number from 1 to {limit}")
        if kind in found:
            raise UserError(f"{where}: {key} stands here twice; keep one")
        found[kind] = int(value)
    slots = found.get("slots", 1)
    if found.get("max_slots", slots) < slots:
        raise UserError(
            f"{where}: max_slots={found['max_slots']} is below slots={slots}; raise it or leave it out"
        )
    return slots, found.get("port")


def _annotations(comment: str, where: str) -> dict[str, str]:
    notes: dict[str, str] = {}
    for word in comment.split():
        match = re.fullmatch(r"([A-Za-z_][A-Za-z0-9_-]*)=(.*)", word)
        if match is None:
            continue  # other words are for people
        key, value = match.groups()
        if key not in _ANNOTATIONS:
            raise UserError(
                f"{where}: unknown annotation {quote(word)}; use {_nearest(key, _ANNOTATIONS, '=')}"
            )
        if key in notes:
            raise UserError(f"{where}: {key}= stands here twice; keep one")
        if not value:
            raise UserError(f"{where}: {key}= has no value; write it or leave it out")
        notes[key] = value
    return notes


def _size(notes: dict[str, str], key: str, where: str) -> int | None:
    """Bytes of `key`=512GiB, or None where the key is absent."""
    if key not in notes:
        return None
    number, unit = _quantity(notes[key])
    if number is None or unit not in _UNITS:
        example = f"such as {key}=256GiB (units {', '.join(_UNITS)})"
        raise UserError(f"{where}: {key}={one_line(notes[key][:40])} is not a size; write it {example}")
    size = int(number * _UNITS[unit])
    if not 2**20 <= size <= 2**60:
        raise UserError(f"{where}: {key}={notes[key]} is not between 1MiB and 1048576TiB; check the unit")
    return size


def _rate(notes: dict[str, str], where: str) -> float | None:
    """Bytes per second of link=1.1 (GB/s) or link=1.1GB/s, or None where it is absent."""
    if "link" not in notes:
        return None
    number, unit = _quantity(notes["link"])
    if number is None or unit not in _RATES or not 0 < number <= 10**6:
        written = one_line(notes["link"][:40])
        example = "gigabytes per second, such as link=1.1GB/s for 10 GbE"
        raise UserError(f"{where}: link={written} is not a speed; write {example}")
    return float(number * _RATES[unit])


def _quantity(written: str) -> tuple[Decimal | None, str]:
    match = _QUANTITY.fullmatch(written)
    return (Decimal(match[1]), match[2]) if match else (None, "")


def _nearest(word: str, known: tuple[str, ...], suffix: str = "") -> str:
    near = difflib.get_close_matches(word[:40].lower(), known, n=1)
    return f"{near[0]}{suffix}" if near else " or ".join(name + suffix for name in known)
