"""The fidelity audit: what each technique of a recipe changes against training with everything in float32.

Decides which pairs of runs are made. The plain run has float32 weights, moments and gradients, nothing divided,
nothing recomputed. Each technique that the recipe turns on is added to it alone; some must not change one bit of
losses and weights, others may change the held-out loss by an amount that is given with its standard error over paired
seeds (same start, same order of data). The noise floor is the plain run from a start that differs by 1e-6.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from statistics import fmean, stdev
from typing import Any

from mlx_empire.plan.shares import RunPlan
from mlx_empire.recipe.changes import variant
from mlx_empire.recipe.schema import Recipe

PLAIN: dict[str, Any] = {
    "model.dtype": "float32",
    "memory.zero_stage": 0,
    "memory.shares": "equal",
    "memory.gradient_checkpointing": False,
    "memory.gradient_dtype": "float32",
    "optimizer.state_bits": 32,
    "optimizer.master_weights": "exact",
    "optimizer.in_backward": False,
}
NOISE_FLOOR = "noise floor: start moved by 1e-6"
ALL = "all of it together"


@dataclass(frozen=True)
class Pair:
    """A technique: what it sets beside the plain run, and what it is compared with (`against` sets that)."""

    name: str
    changes: Mapping[str, Any]
    identical: bool
    against: Mapping[str, Any] = field(default_factory=dict)
    moved: bool = False  # whether the start is moved


@dataclass(frozen=True)
class Outcome:
    """One run: training losses by step, the held-out loss (None without validation data), a digest of the weights."""

    losses: tuple[float, ...]
    held_out: float | None
    digest: str

    @property
    def bits(self) -> bytes:
        """The training losses as they lie in memory."""
        return array("d", self.losses).tobytes()

    @property
    def judged(self) -> float:
        """What runs are compared by: the held-out loss, or the mean of the last quarter's training losses."""
        if self.held_out is not None:
            return self.held_out
        return fmean(self.losses[-max(len(self.losses) // 4, 1) :])


@dataclass(frozen=True)
class Finding:
    """A pair's outcome: `same` bits or not, the relative loss difference and its standard error over seeds."""

    pair: Pair
    plain: tuple[Outcome, ...]
    tried: tuple[Outcome, ...]

    @property
    def same(self) -> bool:
        """Whether losses and weights are equal to the last bit, for every seed; a loss that is no number is as equal to
        another such one as its bits are."""
        both = zip(self.plain, self.tried, strict=True)
        return all((a.bits, a.digest) == (b.bits, b.digest) for a, b in both)

    @property
    def failed(self) -> bool:
        """Whether bits differ that must not."""
        return self.pair.identical and not self.same

    @property
    def difference(self) -> float:
        """Mean of (loss - plain loss) / plain loss."""
        return fmean(self._differences)

    @property
    def standard_error(self) -> float | None:
        """Of the mean; None for a single seed, not a number where a difference is none."""
        if len(self._differences) < 2:
            return None
        if not all(map(isfinite, self._differences)):
            return nan
        return float(stdev(self._differences) / len(self._differences) ** 0.5)

    @property
    def _differences(self) -> list[float]:
        return [b.judged / a.judged - 1 for a, b in zip(self.plain, self.tried, strict=True)]


def pairs_of(recipe: Recipe, plan: RunPlan, dtype: str) -> list[Pair]:
    """The pairs for what `recipe` turns on, `auto` resolved by its `plan`; `dtype` is what its model computes in."""
    stage, work = plan.shards.zero_stage, plan.work
    optimizer, layers = recipe.optimizer, len(plan.shards.units) - 1
    divided: dict[str, Any] = {"memory.zero_stage": stage}
    shares = {"memory.shares": recipe.memory.shares}
    half = {"model.dtype": "bfloat16"}
    every: dict[str, Any] = {**divided, **shares, "memory.gradient_dtype": work.gradient_dtype}
    every |= {
        f"optimizer.{key}": getattr(optimizer, key) for key in ("state_bits", "master_weights", "in_backward")
    }
    every |= {"model.dtype": dtype, "memory.gradient_checkpointing": work.unrecomputed < layers}
    found = [Pair(NOISE_FLOOR, {}, False, moved=True)]
    if stage:
        found.append(Pair(f"ZeRO stage {stage}", divided, True))
    if plan.shards.world_size > 1 and len(set(plan.shards.shares)) > 1:
        found.append(Pair("unequal shares", {**divided, **shares}, True))
    if work.unrecomputed < layers:
        found.append(Pair("gradient checkpointing", {"memory.gradient_checkpointing": True}, True))
    if optimizer.in_backward:
        free = {"optimizer.clip_norm": None}
        release = {"optimizer.in_backward": True}
        found.append(Pair("gradient release, without clipping", {**release, **free}, True, free))
        if optimizer.clip_norm is not None:
            found.append(Pair("gradient release, clipped by earlier norms", release, False))
    if dtype == "bfloat16":
        kept = {**half, "optimizer.master_weights": optimizer.master_weights}
        if optimizer.master_weights == "exact":
            whole = {**half, "optimizer.master_weights": "fp32"}
            found.append(Pair("16 + 16-bit masters against float32 copies", half, True, whole))
        found.append(Pair(f"bfloat16, {optimizer.master_weights} masters", kept, False))
    if dtype == "float16":
        found.append(Pair("float16, float32 masters, scaled losses", {"model.dtype": "float16"}, False))
    if work.gradient_dtype == "bfloat16":
        found.append(Pair("gradients kept in bfloat16", {"memory.gradient_dtype": "bfloat16"}, False))
    if optimizer.state_bits == 8:
        found.append(Pair("8-bit optimizer states", {"optimizer.state_bits": 8}, False))
    return [*found, Pair(ALL, every, False)]


def audit(
    recipe: Recipe,
    pairs: Sequence[Pair],
    seeds: Sequence[int],
    run: Callable[[Recipe, bool], Outcome],
    tell: Callable[[str], None],
) -> list[Finding]:
    """Run every pair for every seed; `run(recipe, moved)` trains once. Runs with equal settings are made once."""
    made: dict[tuple[str, int, bool], Outcome] = {}

    def outcome(name: str, changes: Mapping[str, Any], seed: int, moved: bool) -> Outcome:
        settings = {**PLAIN, **changes}
        key = (repr(sorted(settings.items(), key=lambda item: item[0])), seed, moved)
        if key not in made:
            tell(f"{name}, seed {seed}")
            made[key] = run(variant(recipe, {**settings, "run.seed": seed}), moved)
        return made[key]

    found = []
    for pair in pairs:
        plain = tuple(outcome("plain", pair.against, seed, False) for seed in seeds)
        tried = tuple(outcome(pair.name, pair.changes, seed, pair.moved) for seed in seeds)
        found.append(Finding(pair, plain, tried))
    return found
