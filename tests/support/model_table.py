"""Which models of mlx-lm train here: docs/models.md, made by asking what is asked before every run.

PYTHONPATH=tests python -m support.model_table
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_empire.engine.streamable import verify_scaled_down
from mlx_empire.errors import UserError
from mlx_empire.formats.hf_names import choose_layout
from mlx_empire.model.build import build_model, describe
from mlx_empire.model.config import complete
from support import published
from support.every_model import models, small_config

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGINNING = """\
# Which models train here

Part of [the README](../README.md). `PYTHONPATH=tests python -m support.model_table` writes this page; `make test-slow`
makes it anew and compares, and holds what it says. It is of mlx-lm {version}, on the CPU.

Each row is a module of mlx-lm that defines a model, or one of our own (falcon, olmo). *Trains*: a step of a small model
of it, on two ranks with shares of 2 to 1, has the loss and the gradient norm of the whole model (the module's own,
differentiated in one piece) within 1e-5, and one rank has the same bits; the command trains it and writes `final/`.
*Refused*: one line and exit code 64, before anything is allocated. No module was left out, and none ends in a
traceback.

The last column names published configurations of the module. The model scaled down from each, which a run makes
before it begins, has the whole model's loss and each of its gradients within 1e-4; where it is refused, it says why.

| module | here | published configurations |
|---|---|---|
"""
LACKING = """
Published models for which mlx-lm has no module, and whose plans can still be made: {names}.
"""


def refusal(name: str, **changes: object) -> str | None:
    """The line that refuses a small model of a family, or None; `changes` are made to the language model's keys."""
    config = small_config(name)
    config.get("text_config", config).update(changes)
    return refusal_of(config, name)


def refusal_of(config: Mapping[str, Any], name: str, *, keeps: bool = False) -> str | None:
    """The line that refuses a model before it is trained; None where it is not refused. `keeps`: results of layers."""
    try:
        verify_scaled_down(config, name, keeps=keeps)
    except UserError as error:
        return str(error)
    return None


def refusal_of_published(name: str) -> str | None:
    """As `refusal_of`, of a published configuration; first it must be read as it is meant."""
    try:
        return refusal_of(published.config_of(name), name)
    except UserError as error:
        return str(error)


def refusal_of_folder(name: str) -> str | None:
    """What else refuses a small model of a family: it cannot be read as it is meant, or not be written."""
    try:
        config = complete(small_config(name), name)
        build = partial(build_model, config, name)
        choose_layout(describe(build(), config, name, "float32"), build, None)
    except UserError as error:
        return str(error)
    return None


def page(small: Mapping[str, str | None], large: Mapping[str, str | None]) -> str:
    """The page, from the refusals (or None) of small models by module and of published configurations by name."""
    by_module: dict[str, list[str]] = {}
    for name, line in large.items():
        said = (
            "" if line is None or small.get(published.module_of(name)) is not None else f" ({_reason(line)})"
        )
        by_module.setdefault(published.module_of(name), []).append(name + said)
    rows = [
        f"| {name} | {'trains' if line is None else f'refused: {_reason(line)}'} "
        f"| {', '.join(by_module.pop(name, []))} |\n"
        for name, line in small.items()
    ]
    absent = sorted(name for names in by_module.values() for name in names)
    lacking = LACKING.format(names=", ".join(name.partition(" (")[0] for name in absent)) if absent else ""
    return BEGINNING.format(version=version("mlx-lm")) + "".join(rows) + lacking


def _reason(line: str) -> str:
    """A refusal without the model's name, which its row has; `|` would end the cell."""
    return line.partition(": ")[2].replace("|", "\\|")


def main() -> None:
    """Write the page."""
    small = {name: refusal(name) or refusal_of_folder(name) for name in models()}
    large = {name: refusal_of_published(name) for name in published.names()}
    PAGE.write_text(page(small, large), encoding="utf-8")


if __name__ == "__main__":
    main()
