"""What a run may expect of its data: how much an epoch is, and with `data.sources` how often each of them is read.

In a mixture an epoch is as many rows as all sources have together, drawn as the mixture draws them.
"""

from __future__ import annotations

from fractions import Fraction

from mlx_empire.data.rows import Rows
from mlx_empire.data.splits import WARNING
from mlx_empire.plan.lengths import DataSize
from mlx_empire.recipe.mixture import shares
from mlx_empire.recipe.schema import Recipe

# Muennighoff et al., Scaling data-constrained language models, 2023: to repeat data is nearly as good as new data up to
# four times, and after about sixteen it adds next to nothing.
MOST_PASSES = 16


def data_size(recipe: Recipe, data: Rows) -> DataSize:
    """The rows of an epoch, and the targets that count in it; in a mixture those that are expected."""
    if not recipe.data.sources:
        return DataSize(len(data), data.tokens_per_epoch)
    each = zip(shares(recipe.data.sources), data.parts, strict=True)
    per_row = sum(share * Fraction(part.tokens_per_epoch, len(part)) for share, part in each)
    return DataSize(len(data), round(len(data) * per_row))


def sources_told(recipe: Recipe, data: Rows, steps: int) -> list[str]:
    """A line for each source of a mixture: what it has, and how often a run of so many steps reads it."""
    if not recipe.data.sources:
        return []
    total, told = steps * recipe.batch.global_size, []
    each = zip(recipe.data.paths, shares(recipe.data.sources, steps), data.parts, strict=True)
    for path, share, part in each:
        passes = float(share * total / len(part))
        line = (
            f"source {path}: {len(part)} rows, {part.tokens_per_epoch} targets; {float(share):.1%} of the rows that "
            f"are read, about {passes:.3g} passes over it"
        )
        if not share:
            line = f"{WARNING}: {line}: no step begins between its from and to"
        elif passes > MOST_PASSES:
            line = f"{WARNING}: {line}: beyond {MOST_PASSES} repeating rows adds little; lower its weight, or add rows"
        told.append(line)
    return told
