"""Mixed precision in float16: by what losses are multiplied before the backward pass, step by step.

float16 reaches from 6e-8 to 65504, and most gradients are small. So the loss is multiplied by a power of two S, all
gradients come out S times as large, and the update divides by S, in float32. A power of two changes no bit but where
numbers leave a format's range: at the lower end it brings back what would be 0, at the upper it makes infinities.

Dynamic (Micikevicius et al., "Mixed Precision Training", 2018, section 3.2; the rule is that of torch.amp.GradScaler):

- a step whose loss or gradient norm is not finite is left out: weights and optimizer states stay as they are, also the
  optimizer's count of steps, and S halves. At 1 it cannot fall any more, and the step is an error as without scaling;
- after `window` steps in a row that were not left out, S doubles, up to 2^24 (torch's has no bound).

Loss and norm are numbers that all ranks share, so all decide alike; `carried` belongs into a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FIRST = 2.0**16
LEAST, MOST = 1.0, 2.0**24


@dataclass
class LossScale:
    """`value`: S of the next step. `window`: steps until it doubles; None for a scale that stays.

    `since`: steps since the last change of S; `left_out`: steps that were, in all.
    """

    value: float = 1.0
    window: int | None = None
    since: int = 0
    left_out: int = 0

    @property
    def may_fall(self) -> bool:
        """Whether an overflow may be of the scale's making, and is answered by a smaller one."""
        return self.window is not None and self.value > LEAST

    def held(self) -> None:
        """A step's gradients were finite."""
        if self.window is None:
            return
        self.since += 1
        if self.since >= self.window:
            self.value, self.since = min(2 * self.value, MOST), 0

    def overflowed(self) -> str:
        """A step's were not: what there is to say of it."""
        before, self.value = self.value, self.value / 2
        self.since, self.left_out = 0, self.left_out + 1
        return (
            f"gradients overflowed in float16: this step's update is left out, "
            f"loss scale {before:.0f} -> {self.value:.0f}"
        )

    def carried(self) -> dict[str, list[float]]:
        """What a continued run needs to go on bitwise; nothing of a scale that stays."""
        return {} if self.window is None else {"loss_scale": [self.value, self.since, self.left_out]}

    def carry_on(self, carried: Mapping[str, Sequence[float]]) -> None:
        """Take over what `carried` gave."""
        if self.window is not None and "loss_scale" in carried:
            value, since, left_out = carried["loss_scale"]
            self.value, self.since, self.left_out = value, int(since), int(left_out)
