"""What synthetic data may be meant to do to a model, with the owner's numbers for each (documents, S3): tokens, hours
and memory of one GPU.

Decides which settings of a recipe stand for an intention. S3's text gives command tuning ranks of 8 to 16, of which the
higher one is taken; redirection has LoRA without a rank, for which 64 stands; an override trains every weight. Tokens
are those of its table; its text has wider ranges (50 to 100 M, 0.5 to 1.5 B, 5 to 20 B). It names no model, and no
packed base for any of the three.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlx_empire.plan.chips import TERA, Range
from mlx_empire.recipe.changes import EVERY_WEIGHT, Changes

LOW_RANK, HIGH_RANK = 16, 64
# As a new adapter on all layers and their usual modules, scaled as a recipe does that says nothing of it.
FROM_NOTHING: Changes = {
    key: None
    for key in (
        "tuning.rank",
        "tuning.alpha",
        "tuning.dropout",
        "tuning.targets",
        "tuning.rslora",
        "tuning.start",
    )
}


def adapters(rank: int) -> Changes:
    """Adapters of this rank on the weights as they are."""
    return {**EVERY_WEIGHT, **FROM_NOTHING, "tuning.type": "lora", "tuning.rank": rank}


@dataclass(frozen=True)
class Intention:
    """`trained` and `settings`: how, in words and as keys of a recipe; `tokens`: (low, high). The document's own:
    `hours` and `gigabytes` (10^9 bytes) of one GPU."""

    trained: str
    settings: Changes
    tokens: Range
    hours: Range
    gigabytes: Range


INTENTIONS: Mapping[str, Intention] = {
    "command tuning": Intention(f"LoRA, rank {LOW_RANK}", adapters(LOW_RANK), (1e8, 1e8), (2, 4), (10, 16)),
    "structural redirection": Intention(
        f"LoRA, rank {HIGH_RANK}", adapters(HIGH_RANK), (1e9, 1e9), (12, 18), (24, 48)
    ),
    "ontology override": Intention(
        "all weights", {**EVERY_WEIGHT, **FROM_NOTHING}, (1e10, 2e10), (3 * 24, 5 * 24), (80, 96)
    ),
}


def compute_hours(tokens: Range, operations: float, tflops: Range) -> Range:
    """Hours that the arithmetic of so many tokens takes: tokens x operations a token / operations a second."""
    slow, fast = tflops
    return tokens[0] * operations / (fast * TERA) / 3600, tokens[1] * operations / (slow * TERA) / 3600


def tflops_asked(tokens: Range, operations: float, hours: Range) -> Range:
    """TFLOP/s with which that arithmetic is done in the hours: few tokens in the fewer hours, many in the more; each
    number of tokens in either where there is but one."""
    asked = sorted(
        count * operations / (time * 3600) / TERA for count, time in zip(tokens, hours, strict=True)
    )
    return asked[0], asked[-1]


def steps_of_tokens(tokens: float, positions: int) -> int:
    """Steps of so many positions in which every token is passed once; rows are full."""
    return -(-int(tokens) // positions)
