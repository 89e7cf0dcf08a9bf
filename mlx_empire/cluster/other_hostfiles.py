"""Decides how a cluster is read from MLX's own hostfile, and how a hostfile of mpirun is written or completed.

MLX's is JSON: a list of {"ssh": name, "ips": [...], ...}, or that list as `hosts` beside `backend` and `envs`. Only the
names count here: how ranks reach each other is Open MPI's business.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from mlx_empire.cluster.hostfile import MAX_BYTES, Cluster, Host, load_hostfile, parse_hostfile
from mlx_empire.disk import draft_of
from mlx_empire.errors import UserError
from mlx_empire.recipe.text import one_line, read_small_text


def is_mlx_hostfile(path: Path) -> bool:
    """Whether a hostfile is MLX's: JSON begins with a bracket, and no host's name does."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES).lstrip()[:1] in (b"[", b"{")
    except OSError:
        return False


def load_any_hostfile(path: Path) -> Cluster:
    """The cluster of a hostfile of mpirun or of MLX. UserError, one line."""
    if not is_mlx_hostfile(path):
        return load_hostfile(path)
    text = read_small_text(path, "hostfile", MAX_BYTES, "give the path of a hostfile")
    where = one_line(str(path))
    try:
        value = json.loads(text)
        named = [host["ssh"] for host in (value["hosts"] if isinstance(value, dict) else value)]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f'{where}: not MLX\'s hostfile: expected [{{"ssh": "king.local", ...}}, ...]; write one line per machine '
            "instead, such as localhost slots=2"
        ) from None
    # A name that stands there twice takes two ranks, as it does for mlx.launch.
    lines = [f"{name} slots={named.count(name)}" for name in dict.fromkeys(map(str, named))]
    found = parse_hostfile("\n".join(lines) + "\n", where)
    return Cluster(found.nodes, where)


def written_hostfile(hosts: tuple[Host, ...], slots: int | None = None) -> str:
    """The text of a hostfile of mpirun with these hosts; `slots`: of each, without which as many as each has."""
    lines = []
    for host in hosts:
        login = "" if host.user is None else f"{host.user}@"
        port = "" if host.port is None else f" port={host.port}"
        lines.append(f"{login}{host.name} slots={slots or host.slots}{port}")
    return "\n".join(lines) + "\n"


def with_links(text: str, source: str, rates: Mapping[str, float]) -> str:
    """A hostfile's text with `link=` on the line of each host in `rates` (bytes per second by name); all else stays."""
    lines = text.split("\n")
    for host in parse_hostfile(text, source).nodes:
        if host.name not in rates:
            continue
        line, link = lines[host.line - 1], f"link={written_rate(rates[host.name])}"
        words, mark, comment = line.partition("#")
        if not mark:
            line = f"{words.rstrip()}  # {link}"
        elif host.link_bytes_per_second is None:
            line = f"{line.rstrip()} {link}"
        else:
            line = words + mark + re.sub(r"(?<!\S)link\s*=\s*\S+", link, comment)
        lines[host.line - 1] = line
    return "\n".join(lines)


def written_rate(rate: float) -> str:
    """A speed as a hostfile has it, with three digits that matter."""
    unit, size = ("GB/s", 1e9) if rate >= 1e8 else ("MB/s", 1e6)
    number = float(f"{max(rate / size, 0.001):.3g}")  # never with an exponent, which no hostfile may have
    return f"{number:.9f}".rstrip("0").rstrip(".") + unit


def replace_hostfile(path: Path, text: str) -> None:
    """Put a hostfile in its place at once, with the mode that it had. OSError."""
    place = path.resolve()
    draft = place.with_name(draft_of(place.name))
    draft.write_text(text)
    shutil.copymode(place, draft)
    os.replace(draft, place)
