"""Folders to read from and ways to write and compare them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model folder with mlx's own writer: one file, or several (`files`) with an index."""

    def write(
        config: Mapping[str, Any],
        tensors: Mapping[str, mx.array] | None = None,
        files: Mapping[str, Mapping[str, mx.array]] | None = None,
        name: str = "source",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        if files is None:
            mx.save_safetensors(str(folder / "model.safetensors"), dict(tensors or {}), {"format": "pt"})
            return folder
        for file, held in files.items():
            mx.save_safetensors(str(folder / file), dict(held), {"format": "pt"})
        weight_map = {tensor: file for file, held in files.items() for tensor in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder

    return write
