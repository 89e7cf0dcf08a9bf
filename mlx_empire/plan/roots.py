"""Which of the root's tensors the head uses and which the embedding, by their shapes and names.

The engine asks the model itself; a plan has only numbers. A matrix with a row per token of the vocabulary is the
embedding or the head, and both where there is only one; everything else counts for both.
"""

from __future__ import annotations

from mlx_empire.plan.model import ModelSpec, is_embedding


def root_use(spec: ModelSpec) -> tuple[int, int]:
    """(trainable elements that the head uses, trainable elements that the embedding uses) of the root."""
    tensors = spec.units[0].tensors
    tables = [t for t in tensors if len(t.shape) == 2]
    tied = all(is_embedding(t.name) for t in tables)
    head = embed = 0
    for tensor in tensors:
        if not tensor.trainable:
            continue
        is_table = len(tensor.shape) == 2 and is_embedding(tensor.name)
        position = "wpe" in tensor.name or "position" in tensor.name
        if is_table:
            embed += tensor.size
            head += tensor.size if tied and not position else 0
        else:
            head += tensor.size
    return head, embed
