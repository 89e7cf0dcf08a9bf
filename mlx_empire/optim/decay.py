"""Decides which tensors decay: matrices and embeddings; not norms, biases or router corrections."""

from __future__ import annotations

import re
from collections.abc import Sequence

# A part of a parameter's name that stands for a normalisation: norm, q_norm, input_layernorm, norm1, ln_f ...
_NORM = re.compile(r"(?:^|_)(?:layer|rms|group)?norm\d*(?:_|$)|^ln(?:_|\d|$)")
_BIAS = re.compile(r"(?:^|_)bias(?:es)?$")  # also e_score_correction_bias, DeepSeek V3's router correction


def decays(name: str, shape: Sequence[int]) -> bool:
    """True if weight decay applies to parameter `name` (dotted, as in an mlx-lm model) of `shape`."""
    parts = name.split(".")
    if len(shape) < 2 or _BIAS.search(parts[-1]):
        return False
    return not any(_NORM.search(part) for part in parts)
