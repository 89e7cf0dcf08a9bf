"""A finished result by whatever name a person has for it: its run's folder, the folder of the weights, or another's.

Decides what such a name means. A run's folder means what came of it (`final/`), a daughter's with generations the one
that is `current`; the folder of the weights itself may be named as well, and an adapter's folder that no run of ours
made. A run that is not finished is none.

And on which base an adapter speaks: on the weights that it was trained on, and where those were packed while they were
loaded (qlora) on a folder with the same packing of them.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_empire.checkpoint.manifest import sampled_digest
from mlx_empire.errors import UserError
from mlx_empire.formats.adapter_folder import CONFIG_NAME
from mlx_empire.formats.peft import PEFT_NAME
from mlx_empire.formats.staging import export_record
from mlx_empire.model.config import read_config
from mlx_empire.model.quantize import DEFAULT_BITS
from mlx_empire.recipe.load import load_recipe
from mlx_empire.run.launched import COMPLETE
from mlx_empire.run.names import CURRENT, FINAL, RECIPE, plan_of

PACKED_FROM = "packed_from"  # in EXPORT.json


@dataclass(frozen=True)
class Finished:
    """The folder with weights, and that of the run that made them; None where none of ours did."""

    weights: Path
    run: Path | None

    @property
    def adapter(self) -> bool:
        """Whether the weights are an adapter's."""
        return (self.weights / CONFIG_NAME).exists()

    @property
    def plan(self) -> dict[str, Any]:
        """What the run's `plan.json` says; empty where there is none."""
        return {} if self.run is None else plan_of(self.run)

    def base_differs(self, digest: str | None) -> bool:
        """Whether an adapter was trained on other weights than those of `digest`; where either is not known, no."""
        theirs = self.plan.get("base_digest")
        return None not in (digest, theirs) and theirs != digest

    def speaks_on(self, base: Path, digest: str, *, named: bool) -> bool:
        """Whether an adapter belongs to the base in a folder, whose weights have `digest`.

        `named`: a person chose the folder. Only then a packed one that does not say what it was made from will do.
        """
        if not self.base_differs(digest):
            return True
        assert self.run is not None, "an adapter without a run differs from no base"
        with suppress(UserError):
            tuning = load_recipe(self.run / RECIPE).tuning
            if tuning.type == "qlora" and read_config(base).get("quantization"):
                told = export_record(base).get(PACKED_FROM)
                ours = _packing(self.plan.get("base_digest"), tuning.bits or DEFAULT_BITS)
                return named if told is None else bool(told == ours)
        return False


def packed_from(base: Path, bits: int | str) -> dict[str, Any]:
    """What EXPORT.json says of a base that is packed: which weights it was made from, and how."""
    return {PACKED_FROM: _packing(sampled_digest(base), bits)}


def _packing(digest: str | None, bits: int | str) -> dict[str, str | None]:
    return {"base_digest": digest, "bits": str(bits)}


def finished(named: Path, key: str) -> Finished:
    """What `named`, the value of `key`, means. UserError where it is not there or not finished."""
    if not named.is_dir():
        raise UserError(f"{key}: {named}: no such folder; name a finished run, or the folder of its weights")
    weights = current_of(named).resolve()
    if (weights / RECIPE).exists():
        weights /= FINAL
    inner = weights.parent if weights.name == PEFT_NAME else weights
    run = inner.parent if inner.name == FINAL and (inner.parent / RECIPE).exists() else None
    if run is None:
        return Finished(weights, None)
    if not (run / COMPLETE).exists() or not weights.is_dir():
        raise UserError(
            f"{key}: {named}: this run is not finished; the command that began it goes on with it"
        )
    return Finished(weights, run)


def current_of(named: Path) -> Path:
    """The folder itself, and where a link says which of several is in use that one: itself `current`, or beside it."""
    place = named / CURRENT if (named / CURRENT).is_symlink() else named
    return place.resolve() if place.is_symlink() else place
