"""What a base's own config.json says of which program lets a result speak; read without MLX, as lists of runs are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_empire.model.mlx_lm_modules import OURS
from mlx_empire.model.packing_config import BITNET_NAME, METHOD


def is_of_our_family(folder: Path) -> bool:
    """Whether the model's file is one of ours, so that mlx-lm's own commands do not know the family."""
    return _configuration(folder).get("model_type") in OURS


def bitnet_family(folder: Path) -> str | None:
    """The model_type of a base in BitNet's layout, of whose modules mlx-lm cannot make LoRA's; None of another one."""
    found = _configuration(folder)
    packing = found.get("quantization_config")
    packed = isinstance(packing, Mapping) and packing.get(METHOD) == BITNET_NAME
    return str(found.get("model_type")) if packed else None


def _configuration(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
