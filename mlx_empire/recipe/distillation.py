"""The section on a teacher: a model whose likeliest tokens a run learns from beside its rows (`model.distillation`)."""

from typing import Annotated

from pydantic import Field

from mlx_empire.recipe.fields import RecipePath, Section


class DistillationSection(Section):
    teacher: RecipePath | None = Field(
        title="The model that is asked once about every row, and learnt from beside the rows themselves.",
        default=None,
        description="the path of a local Hugging Face folder with the same tokens as the model, or null (no teacher)",
    )
    weight: Annotated[float, Field(gt=0, le=1)] = Field(
        title="How much of the loss is the divergence from the teacher; the rest is the cross-entropy.",
        default=0.5,
        description="a number above 0 and up to 1 (1: the rows' own tokens do not count)",
    )
    temperature: Annotated[float, Field(ge=0.05, le=100)] = Field(
        title="By what logits are divided first: above 1 what the teacher thinks unlikely counts for more.",
        default=1.0,
        description="a number from 0.05 to 100",
    )
    top: Annotated[int, Field(ge=1, le=4096)] = Field(
        title="How many of the teacher's likeliest tokens are kept of each target; all others count as one.",
        default=64,
        description="a whole number from 1 to 4096, below the vocabulary's size",
    )
