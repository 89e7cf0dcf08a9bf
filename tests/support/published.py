"""Configurations of published models: the package's catalog and `fixtures/published.json`, by name."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from mlx_lm.utils import MODEL_REMAPPING

from mlx_empire.model import catalog
from mlx_empire.model.config import complete

FILE = Path(__file__).parents[1] / "fixtures" / "published.json"


@cache
def _read() -> dict[str, dict[str, Any]]:
    return {name: dict(config) for name, config in json.loads(FILE.read_text(encoding="utf-8")).items()}


def names() -> list[str]:
    """All names, sorted."""
    return sorted({*_read(), *catalog.names()})


def config_of(name: str) -> dict[str, Any]:
    """The completed configuration `name`."""
    own = _read()
    return complete(own[name], name) if name in own else catalog.load(name)[0]


def module_of(name: str) -> str:
    """The module of mlx-lm that would build it, whether or not mlx-lm has it."""
    own = _read()
    kind = str((own[name] if name in own else catalog.load(name)[0])["model_type"])
    return str(MODEL_REMAPPING.get(kind, kind))
