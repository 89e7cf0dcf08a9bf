"""Trained adapters as folders: mlx-lm's format, and PEFT's in the sub-folder `peft` where the family's names allow it.

Both formats call their settings `adapter_config.json`, so they cannot share one folder:

    final/       adapters.safetensors, adapter_config.json: `mlx_lm.load(model, adapter_path=...)`, `mlx_lm.fuse`
    final/peft/  adapter_model.safetensors, adapter_config.json: `peft.PeftModel.from_pretrained` on torch

The base is not part of them. Staged, recorded and as private as every other export.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_empire.disk import with_headroom
from mlx_empire.errors import UserError
from mlx_empire.formats.peft import (
    PEFT_NAME,
    PEFT_WEIGHTS,
    from_peft,
    no_peft_form,
    peft_config,
    peft_weights,
)
from mlx_empire.formats.safetensors import Entry, array_bytes, read_header, write_tensors
from mlx_empire.formats.staging import (
    disk_errors,
    fresh_folder,
    publish,
    refuse_foreign,
    remove,
    require_room,
    write_json,
    write_text,
)
from mlx_empire.model.lora import AdapterSettings
from mlx_empire.model.spec import ModelSpec

WEIGHTS_NAME, CONFIG_NAME, CARD_NAME = "adapters.safetensors", "adapter_config.json", "README.md"


@dataclass(frozen=True)
class Adapter:
    """An adapter in mlx-lm's terms: settings of the layers, and tensors by mlx-lm's names."""

    settings: AdapterSettings
    weights: Mapping[str, mx.array]


class AdapterWriter:
    """Takes a model's tensors unit by unit, keeps the adapters (they are small) and writes `out` when closed.

    spec: the tuned model. base: where its base lies, as PEFT's settings name it. huggingface: the family's names are
    Hugging Face's. `card`: text of the model card; none where empty.
    """

    def __init__(
        self, out: Path, spec: ModelSpec, settings: AdapterSettings, base: str, *, huggingface: bool
    ) -> None:
        refuse_foreign(out)
        self.out, self._spec, self._settings, self._base = out, spec, settings, base
        self.card = ""
        self.notes: list[str] = []
        self._huggingface = huggingface
        self._temporary = out.parent / f".{out.name}.partial"
        self._adapters: dict[str, mx.array] = {}

    def write_unit(self, index: int, tensors: Mapping[str, mx.array]) -> None:
        """Take copies of one unit's adapters, named as in the spec: the caller may reuse the memory afterwards."""
        names = [t.name for t in self._spec.units[index].tensors if t.trainable]
        self._adapters |= {name: mx.array(np.array(tensors[name])) for name in names}

    def close(self) -> None:
        """Write, check the headers, and rename. NoRoomError; after an error it may be called again."""
        assert len(self._adapters) == sum(t.trainable for u in self._spec.units for t in u.tensors)
        adapter = Adapter(self._settings, self._adapters)
        self.notes = []
        with disk_errors(self.out):
            remove(self._temporary)
            formats = 2  # mlx-lm's and PEFT's
            require_room(self.out, with_headroom(formats * sum(4 * a.size for a in self._adapters.values())))
            fresh_folder(self._temporary)
            write_mlx_lm(self._temporary, adapter)
            why = no_peft_form(self._spec, huggingface=self._huggingface)
            if why is None:
                fresh_folder(self._temporary / PEFT_NAME)
                write_peft(self._temporary / PEFT_NAME, adapter, self._spec, self._base)
            else:
                self.notes.append(f"no adapter in PEFT's format was written: {why}")
            if self.card:
                write_text(self._temporary / CARD_NAME, self.card)
            publish(self._temporary, self.out, "mlx-lm adapters", self.notes)

    def discard(self) -> None:
        """Remove what an attempt to close has left; `out` is left as it was."""
        remove(self._temporary)


def write_mlx_lm(folder: Path, adapter: Adapter) -> None:
    """Write mlx-lm's two files into an empty folder."""
    _write_tensors(folder / WEIGHTS_NAME, adapter.weights, "mlx")
    write_json(folder / CONFIG_NAME, adapter.settings.config())


def write_peft(folder: Path, adapter: Adapter, spec: ModelSpec, base: str) -> None:
    """Write PEFT's two files into an empty folder; `spec` is the tuned model."""
    _write_tensors(folder / PEFT_WEIGHTS, peft_weights(adapter.weights, spec), "pt")
    write_json(folder / CONFIG_NAME, peft_config(adapter.settings, adapter.weights, spec, base))


def read_mlx_lm(folder: Path) -> Adapter:
    """An adapter in mlx-lm's format; UserError for what is damaged or no adapter."""
    config = read_settings(folder)
    try:
        kind, found = config["fine_tune_type"], config["lora_parameters"]
        if kind not in ("lora", "dora") or not isinstance(found["keys"], list):
            raise ValueError(f"fine_tune_type {kind!r}, keys {found['keys']!r:.40}")
        settings = AdapterSettings(
            kind == "dora",
            int(config["num_layers"]),
            int(found["rank"]),
            float(found["scale"]),
            float(found["dropout"]),
            tuple(map(str, found["keys"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG_NAME}: not mlx-lm's adapter settings ({error})") from None
    return Adapter(settings, read_tensors(folder / WEIGHTS_NAME))


def read_adapter(folder: Path, base: ModelSpec) -> Adapter:
    """An adapter in mlx-lm's format or PEFT's; `base` is the model without adapters. UserError."""
    if (folder / WEIGHTS_NAME).exists():
        return read_mlx_lm(folder)
    if not (folder / PEFT_WEIGHTS).exists():
        raise UserError(f"{folder}: neither {WEIGHTS_NAME} nor {PEFT_WEIGHTS} is there")
    return Adapter(*from_peft(read_settings(folder), read_tensors(folder / PEFT_WEIGHTS), base, str(folder)))


def read_settings(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` of either format. UserError."""
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a folder with an adapter") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({str(error)[:80]})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not an adapter's settings")
    return config


def read_tensors(path: Path) -> dict[str, mx.array]:
    """All tensors of a checked safetensors file, lazily."""
    read_header(path)
    loaded = mx.load(str(path), format="safetensors")
    assert isinstance(loaded, dict)
    return loaded


def _write_tensors(path: Path, arrays: Mapping[str, mx.array], layout: str) -> None:
    entries = [Entry(n, "F32", tuple(a.shape), partial(array_bytes, a)) for n, a in arrays.items()]
    size = write_tensors(path, entries, {"format": layout})
    assert read_header(path).file_bytes == size
