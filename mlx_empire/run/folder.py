"""A run's folder: whether it may be used, and what is written into it before the first step.

`recipe.yaml` is the recipe as resolved, `plan.json` who keeps what and how much memory that needs. Files are private.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

from mlx_empire.checkpoint.paths import refuse_broken_link
from mlx_empire.cluster.hostfile import Node
from mlx_empire.data.splits import Splits
from mlx_empire.disk import replace_private
from mlx_empire.errors import EmpireError, UserError
from mlx_empire.model.spec import ModelSpec
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.assess import assess_plan
from mlx_empire.plan.chips import known_speed
from mlx_empire.plan.hardware import wire_of
from mlx_empire.plan.pace import pace_of
from mlx_empire.plan.shares import RunPlan
from mlx_empire.recipe.load import dump_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.launched import COMPLETE
from mlx_empire.run.names import PLAN, RECIPE, plan_of

CLIPPING = {  # what plan.json says, by whether gradients are released
    False: "by the step's own global norm",
    True: "by the last step's global norm, or that of this step's units so far where it is larger",
}


def refuse_finished(folder: Path) -> None:
    """UserError where a finished run lies: its weights are not ours to replace."""
    if (folder / COMPLETE).exists():
        raise UserError(
            f"run.dir: {folder} holds a finished run; choose another run.dir or remove that folder"
        )


def refuse_unwritable(folder: Path) -> None:
    """UserError where the run's folder could not be made, said before hours of work; nothing is written."""
    refuse_broken_link("run.dir", folder)
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not nearest.is_dir():
        raise UserError(f"run.dir: {folder}: {nearest} is a file; choose a folder that can be written")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"run.dir: {folder}: {nearest} may not be written; choose a folder that can be")


def write_plan(
    recipe: Recipe,
    plan: RunPlan,
    nodes: Sequence[Node],
    spec: ModelSpec,
    splits: Splits,
    steps: int,
    *,
    resumed: bool = False,
    origin: Mapping[str, object] = MappingProxyType({}),
    scorers: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """`recipe.yaml` (resolved) and `plan.json` in the run's folder; only a `resumed` run keeps its metrics.

    `origin`: what plan.json also says, of where the run comes from (`parent.beside_plan`); `scorers`: by path the
    digests of the files of the sets' own functions.
    """
    folder = recipe.run.dir
    stale = [PLAN, RECIPE] if resumed else ["metrics.jsonl", "samples.json", PLAN, RECIPE]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in stale:  # of an earlier run that did not finish
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"run.dir: {folder}: {error.strerror}; choose a folder that can be written") from None
    try:
        replace_private(folder / RECIPE, dump_recipe(recipe) + "\n")
        document = plan_document(plan, nodes, spec, splits.digest, steps) | dict(origin)
        seconds = planned_seconds(recipe, plan, spec, nodes)
        document |= {} if seconds is None else {"step_seconds": seconds}
        document |= {"scorers": dict(scorers)} if scorers else {}
        replace_private(folder / PLAN, json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"run.dir: {folder}: {error.strerror}; make it possible to write there") from None


def refuse_other_scorers(recipe: Recipe, now: Mapping[str, str]) -> None:
    """UserError where a scorer's file holds other code than plan.json says that the run was scored by so far; `now`: by
    path the digests of what would score it.
    """
    before = plan_of(recipe.run.dir).get("scorers") or {}
    changed = [path for path, digest in now.items() if before.get(path, digest) != digest]
    if changed and not any(key.startswith("evaluation.") for key in recipe.run.accept_changes):
        raise UserError(
            f"{recipe.run.dir}: evaluation.sets: scorer: {changed[0]} holds other code than the run was scored by; "
            "bring back what was there, add run.accept_changes=[evaluation.sets], or begin anew with run.resume=never"
        )


def planned_seconds(
    recipe: Recipe, plan: RunPlan, spec: ModelSpec, nodes: Sequence[Node]
) -> list[float] | None:
    """How long a step takes at least and at most, by what the chips and the wire are known to do; None where a chip is
    not known, or the model's graph cannot be read."""
    if known_speed(nodes) is None:
        return None
    try:
        pace = pace_of(assess_plan(recipe, plan, spec, nodes, state_bytes_of), wire_of(nodes))
    except EmpireError:  # the plan that the run goes by is made; this one is for who looks on
        return None
    return list(pace.step_seconds)


def plan_document(
    plan: RunPlan, nodes: Sequence[Node], spec: ModelSpec, data_digest: str, steps: int
) -> dict[str, object]:
    """The plan as JSON; sizes in bytes, a rank's ledger at its worst moment."""
    by_rank = zip(nodes, plan.shards.shares, plan.ledgers, plan.limits, strict=True)
    return {
        "parameters": spec.parameters,
        "trainable_parameters": spec.trainable_parameters,
        "dtype": spec.dtype,
        "zero_stage": plan.shards.zero_stage,
        "tail": plan.work.unrecomputed,
        "wave": plan.work.wave,
        "activation_offload": plan.work.offload,
        "clipping": CLIPPING[plan.work.optimizer_in_backward],
        "gradient_dtype": plan.work.gradient_dtype,
        "cells": plan.work.layout.cells,
        "steps": steps,
        "data_digest": data_digest,
        "ranks": [
            {
                "node": asdict(node),
                "share": share,
                "ledger": ledger.items(),
                "peak_bytes": ledger.peak,
                "limit_bytes": limit,
            }
            for node, share, ledger, limit in by_rank
        ],
    }
