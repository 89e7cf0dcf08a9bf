"""The sections of a recipe that say how weights are updated: the optimizer, and the schedule of its learning rate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from mlx_empire.recipe.duration import Duration
from mlx_empire.recipe.fields import (
    LENGTHS,
    AnyLength,
    Beta,
    Count,
    Section,
    as_tuple,
    exact_number,
)


class OptimizerSection(Section):
    name: Literal["adamw", "lion", "sgd"] = Field(
        title="The rule by which weights are updated.",
        default="adamw",
        description="adamw, lion or sgd (with momentum, the first of betas)",
    )
    learning_rate: Annotated[float, Field(gt=0, le=10)] = Field(
        title="The size of an update at the schedule's peak.",
        description="a number above 0 and up to 10, such as 1e-5",
    )
    weight_decay: Annotated[float, Field(ge=0, le=10)] = Field(
        title="By which part of itself, times the learning rate, a matrix shrinks at each step.",
        default=0.0,
        description="a number from 0 to 10",
    )
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(as_tuple)] = Field(
        title="Over how many steps gradients, and their squares, are averaged.",
        default=(0.9, 0.999),
        description="a list of two numbers from 0 to below 1, such as [0.9, 0.999]",
    )
    eps: Annotated[float, Field(gt=0, le=1)] = Field(
        title="What keeps adamw from dividing by nothing.",
        default=1e-8,
        description="a number above 0 and up to 1, such as 1e-8",
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        title="To which norm larger gradients are scaled down.",
        default=1.0,
        description="a number above 0 (the largest global gradient norm), or null (no clipping)",
    )
    state_bits: Annotated[Literal[8, 32], BeforeValidator(exact_number)] = Field(
        title="In how many bits the optimizer's averages are kept.",
        default=32,
        description="8 or 32 (bits per optimizer state)",
    )
    master_weights: Literal["exact", "diet", "fp32", "none"] = Field(
        title="What is kept beside a bfloat16 weight, so that small updates are not lost.",
        default="exact",
        description="exact (2 bytes more than bfloat16, all of float32), diet (1 byte), fp32 (4) or none; a float16 "
        "weight has a float32 master of 4 bytes with exact and fp32",
    )
    statistics_every: Count | None = Field(
        title="How often metrics.jsonl also says how healthy the optimizer's averages are.",
        default=100,
        description="a whole number of steps (after which metrics.jsonl also says how the states are), or null",
    )
    in_backward: bool = Field(
        title="Whether gradients are used up as they come, which saves their memory.",
        default=False,
        description="true (a unit is updated as soon as its gradient is complete, which is not kept; clipped by the "
        "norm of the last step) or false",
    )


class ScheduleSection(Section):
    type: Literal["constant", "cosine", "linear"] = Field(
        title="How the learning rate falls after its peak.",
        default="constant",
        description="constant, cosine or linear",
    )
    warmup: AnyLength = Field(
        title="How long the learning rate rises from next to nothing.",
        default=Duration(0),
        description=f"a duration: {LENGTHS}; or 0",
    )
    final: Annotated[float, Field(ge=0, le=1)] = Field(
        title="Where the learning rate ends.",
        default=0.0,
        description="a number from 0 to 1 (the fraction of the learning rate that is left at the end)",
    )
