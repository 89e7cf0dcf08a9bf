"""What one call of the optimizer needs beside states, gradients and new weights: measured, by its states' form."""

from __future__ import annotations

# Bytes per element of a large chunk, which is evaluated alone: by (8 bits, two moments), then by what is kept beside
# the weights (`float32`: nothing is, nor needed).
_UPDATE: dict[tuple[bool, bool], dict[str, int]] = {
    (False, True): {"float32": 8, "exact": 18, "diet": 25, "fp32": 12, "none": 24},
    (False, False): {"float32": 8, "exact": 14, "diet": 21, "fp32": 12, "none": 20},
    (True, True): {"float32": 21, "exact": 35, "diet": 38, "fp32": 25, "none": 37},
    (True, False): {"float32": 23, "exact": 29, "diet": 36, "fp32": 27, "none": 35},
}
_SMALL_CHUNKS = 0.83  # of that with 8-bit states for chunks evaluated together: they are freed one by one


class StateCost(dict[str, int]):
    """Bytes of each array of a state, by name; and what an update needs besides, in bytes per element.

    `alone`: of a large chunk, which is evaluated alone; `together`: of small ones that are evaluated at once.
    """

    def __init__(self, sizes: dict[str, int], moments: tuple[str, ...], master: str, *, codes: bool) -> None:
        """`master`: what completes the weights, or `float32` where they need nothing; `codes`: moments in 8 bits."""
        super().__init__(sizes)
        self.alone: float = _UPDATE[codes, "v" in moments][master]
        self.together = _SMALL_CHUNKS * self.alone if codes else self.alone
