"""The proof, before a run with packed rows, that the rows of a micro-batch do not see each other's documents.

A layer gets one mask for all rows; whether it reads a row's part of it for that row is mlx-lm's module's doing, and a
wrong broadcast says nothing. So a model scaled down reads rows with different documents together and one by one.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_empire.errors import UserError
from mlx_empire.model.build import foreign
from mlx_empire.model.layers import SlottedModel, hidden_of, separable, separate

WIDTH, ROWS = 12, 4


def verify_packing(model: nn.Module, name: str, vocabulary: int, tolerance: float) -> None:
    """UserError naming `name` where a row's hidden state behind the last layer depends on what is beside it.

    `model`: small, with weights, in float32. Models that cannot be packed at all are refused elsewhere.
    """
    slotted = SlottedModel(model, name)
    tokens = mx.array(np.random.default_rng(0).integers(0, vocabulary, (ROWS, WIDTH)).astype(np.int32))
    # A row's documents begin where no other row's do.
    documents = mx.array((np.arange(WIDTH) >= 2 + 3 * np.arange(ROWS)[:, None]).astype(np.int32))
    differences = []
    with foreign(f"data.packing: true: {name}: its layers cannot read packed rows together", mixed=True):
        for rows in range(2, ROWS + 1):
            together = _through(slotted, tokens[:rows], documents[:rows])
            for r in range(rows):
                alone = _through(slotted, tokens[r : r + 1], documents[r : r + 1])
                if together is None or alone is None:
                    return
                differences.append(mx.max(mx.abs(together[r] - alone[0])) / mx.max(mx.abs(alone)))
    worst = mx.max(mx.stack(differences))
    if not bool((worst <= tolerance).item()):
        raise UserError(
            f"data.packing: true: {name}: a row's documents see those of other rows ({worst.item():.1e}, relative), "
            "so it would be trained wrongly; set data.packing: false"
        )


def _through(slotted: SlottedModel, tokens: mx.array, documents: mx.array) -> mx.array | None:
    """The hidden state behind the last layer; None where documents cannot be kept apart by masks."""
    hidden, arguments = slotted.capture(tokens)
    for layer, given in zip(slotted.layers, arguments, strict=True):
        if not separable(layer, given, WIDTH):
            return None
        kept = separate(layer, given, documents)
        hidden = hidden_of(layer(hidden, *kept.positional, **kept.keywords))
    return hidden
