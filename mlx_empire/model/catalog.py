"""The catalog: configurations of known architectures that ship with the package, by name.

`model.architecture` names one where the model's folder is not there. Each file is a `config.json` with an extra
`_facts` entry (published and closed-form parameter counts, for tests and reports).
"""

from __future__ import annotations

import difflib
import json
from functools import cache
from importlib.resources import files
from typing import Any

from mlx_empire.errors import UserError
from mlx_empire.model.config import complete


@cache
def names() -> tuple[str, ...]:
    """All catalog names, sorted."""
    folder = files("mlx_empire.model") / "architectures"
    return tuple(sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")))


def load(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(completed configuration, facts) of a catalog entry; UserError with the nearest name for an unknown one."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names())}"
        raise UserError(f"model.architecture: {name}: not in the catalog; {hint}")
    config = json.loads((files("mlx_empire.model") / "architectures" / f"{name}.json").read_text("utf-8"))
    facts = config.pop("_facts", {})
    return complete(config, name), facts


def nearest(name: str) -> str:
    """The catalog name most like `name`, whatever that is."""
    return difflib.get_close_matches(name, names(), 1, cutoff=0.0)[0]
