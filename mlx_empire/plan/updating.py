"""What one call of the optimizer needs beside states, gradients and new weights: measured, by its states' form."""

from __future__ import annotations

from collections.abc import Mapping

from mlx_empire.plan.model import BLOCK
from mlx_empire.plan.shards import CHUNK_ELEMENTS, SHARED_ELEMENTS, Segment

# One optimizer call beside the new weights, measured, bytes per element of a large chunk, which is evaluated alone: by
# (8 bits, two moments), then by what is kept beside the weights (`float32`: nothing is, nor needed).
UPDATE: dict[tuple[bool, bool], dict[str, int]] = {
    (False, True): {"float32": 8, "exact": 18, "diet": 25, "fp32": 12, "none": 24},
    (False, False): {"float32": 8, "exact": 14, "diet": 21, "fp32": 12, "none": 20},
    (True, True): {"float32": 21, "exact": 35, "diet": 38, "fp32": 25, "none": 37},
    (True, False): {"float32": 23, "exact": 29, "diet": 36, "fp32": 27, "none": 35},
}
SMALL_CHUNKS = 0.83  # of that with 8-bit states for chunks evaluated together: they are freed one by one
_KEPT = {"optimizer remainder": "exact", "optimizer short_remainder": "diet", "optimizer master": "fp32"}


def temporaries(segment: Segment, start: int, stop: int, states: Mapping[str, int]) -> int:
    """Bytes at the worst moment of updating [start, stop) of a segment; `states` as the ledger names them."""
    codes = segment.kind == "trainable" and "optimizer m_codes" in states
    two = "optimizer v" in states or "optimizer v_codes" in states
    master = next((kind for name, kind in _KEPT.items() if name in states), "none")
    each = UPDATE[codes, two][master if segment.dtype == "bfloat16" else "float32"]
    together, largest = largest_update(segment, start, stop)
    return int(max((SMALL_CHUNKS if codes else 1) * each * together, each * largest))


def largest_update(segment: Segment, start: int, stop: int) -> tuple[int, int]:
    """Elements of small chunks of [start, stop) that the update evaluates at once, and of the largest chunk."""
    full = CHUNK_ELEMENTS // BLOCK
    waiting = together = largest = 0
    for placement in segment.placements:
        first = placement.start // BLOCK
        row = max(first, start // BLOCK)
        end = min(first + placement.tensor.padded_size // BLOCK, stop // BLOCK)
        if row >= end:
            continue
        # Up to the next cut, counted from the tensor's start; whole chunks, of which one counts; the rest.
        head = min(full - (row - first) % full, end - row)
        whole, tail = divmod(end - row - head, full)
        for rows in (head, *[full] * min(whole, 1), tail):
            waiting = waiting + rows if (waiting + rows) * BLOCK <= SHARED_ELEMENTS else rows
            largest = max(largest, rows)
            if waiting > rows:
                together = max(together, waiting)
    return together * BLOCK, largest * BLOCK
