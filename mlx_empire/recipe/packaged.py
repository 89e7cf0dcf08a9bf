"""Which recipes and hostfiles come with the package, and how they are found by name.

In a checkout they are the files in `recipes/` and `hosts/` at its top, to which links in the package lead.
"""

from __future__ import annotations

from pathlib import Path

import mlx_empire

RECIPES, HOSTS = "recipes", "hosts"
_ENDINGS = {RECIPES: ".yaml", HOSTS: ".txt"}


def packaged(kind: str) -> dict[str, Path]:
    """The files of a kind (`RECIPES` or `HOSTS`) that come with the package, by name without the ending."""
    folder = Path(mlx_empire.__file__).parent / kind
    return {file.stem: file for file in sorted(folder.glob(f"*{_ENDINGS[kind]}"))}


def recipe_file(written: str) -> Path:
    """The recipe that a person names: a file of that path, or else a packaged one as `tiny` or `recipes/tiny.yaml`."""
    return _found(written, RECIPES)


def host_file(written: str) -> Path:
    """The hostfile that a person names: a file of that path, or else a packaged one as `local` or `hosts/local.txt`."""
    return _found(written, HOSTS)


def _found(written: str, kind: str) -> Path:
    path = Path(written)
    named = path.parent in (Path(), Path(kind)) and path.suffix in ("", _ENDINGS[kind])
    try:
        return packaged(kind).get(path.stem, path) if named and not path.exists() else path
    except (OSError, ValueError):  # no possible path; whoever reads it says so
        return path
