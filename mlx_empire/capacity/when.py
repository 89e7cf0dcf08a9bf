"""Decides what a report says of when: the first evaluation, the first checkpoint, what a crash costs, the end.

And what lengths in targets and epochs rest on: the rows, where they can be read as training would read them, else an
assumption, which is said. Reading tokenises the data; what comes of it is kept in the cache for the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_empire.errors import UserError
from mlx_empire.model.spec import ModelSpec
from mlx_empire.plan.lengths import ASSUMED_STEPS, DataSize
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.text import run_length
from mlx_empire.run.shared_rows import load_data
from mlx_empire.run.sources import data_size

if TYPE_CHECKING:
    from mlx_empire.capacity.document import CapacityReport


def size_of(recipe: Recipe, spec: ModelSpec) -> tuple[DataSize | None, str]:
    """The data's size where a length of the run hangs on it (None: not known), and what there is to say of it."""
    run = recipe.run
    lengths = (
        ("run.steps", run.steps),
        ("run.save_every", run.save_every),
        ("run.eval_every", run.eval_every),
    )
    asked = [f"{key} {length}" for key, length in lengths if length and length.unit in ("tokens", "epochs")]
    if not asked:
        return None, ""
    try:
        for path in recipe.data.paths:
            if not path.exists():
                raise UserError(f"{path} is not here")
        train = load_data(recipe, spec, thorough=False).train
    except UserError as error:
        whole = "the run" if run.steps.unit == "epochs" else "an epoch"
        return None, (
            f"{', '.join(asked)}: not counted ({error}): every position is taken as a target that counts, and {whole} "
            f"as {ASSUMED_STEPS:,} steps"
        )
    size = data_size(recipe, train)
    counted = f"{size.rows:,} rows with {size.targets:,} counted targets"
    return size, f"{', '.join(asked)}: counted on {recipe.data.named}: {counted}"


def milestones(report: CapacityReport) -> list[tuple[str, str]]:
    """What comes when over the wire that is there, as names and values for people."""
    pace = report.paces[0]
    evaluation, checkpoint = pace.first_evaluation, pace.first_checkpoint
    never = "the whole run: run.save_every is null, so there are no checkpoints"
    return [
        ("evaluations", f"before step 1, then after {run_length(evaluation)}" if evaluation else "none"),
        ("first checkpoint", f"after {run_length(checkpoint)}" if checkpoint else "none"),
        ("a crash costs at most", f"{run_length(pace.lost)} of work" if checkpoint else never),
        ("the end, if started now", report.last_days(pace)),
    ]
