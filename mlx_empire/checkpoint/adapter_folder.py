"""Trained adapters as a folder that `mlx_lm.load(model, adapter_path=...)` opens: weights, and settings of the layers.

The base is not part of it. Staged, recorded and as private as every other export.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlx_empire.adapters.layers import AdapterSettings
from mlx_empire.checkpoint.sidefiles import write_json
from mlx_empire.checkpoint.staging import disk_errors, fresh_folder, publish, refuse_foreign
from mlx_empire.checkpoint.tensorfile import Entry, array_bytes, read_header, write_file
from mlx_empire.plan.model import ModelSpec

WEIGHTS_NAME, CONFIG_NAME = "adapters.safetensors", "adapter_config.json"


class AdapterWriter:
    """Takes a model's tensors unit by unit, keeps the adapters (they are small) and writes `out` when closed."""

    def __init__(self, out: Path, spec: ModelSpec, settings: AdapterSettings) -> None:
        refuse_foreign(out)
        self.out, self._spec, self._settings = out, spec, settings
        self.notes: list[str] = []
        self._temporary = out.parent / f".{out.name}.partial"
        self._adapters: dict[str, mx.array] = {}

    def write_unit(self, index: int, tensors: Mapping[str, mx.array]) -> None:
        """Take one unit's tensors, named as in the spec."""
        names = [t.name for t in self._spec.units[index].tensors if t.trainable]
        self._adapters |= {name: tensors[name] for name in names}

    def close(self) -> None:
        """Write, check the header, and rename."""
        assert len(self._adapters) == sum(t.trainable for u in self._spec.units for t in u.tensors)
        entries = [
            Entry(n, "F32", tuple(a.shape), partial(array_bytes, a)) for n, a in self._adapters.items()
        ]
        with disk_errors(self.out):
            fresh_folder(self._temporary)
            size = write_file(self._temporary / WEIGHTS_NAME, entries, {"format": "mlx"})
            assert read_header(self._temporary / WEIGHTS_NAME).file_bytes == size
            write_json(self._temporary / CONFIG_NAME, self._settings.config())
            publish(self._temporary, self.out, "mlx-lm adapters", self.notes)
