"""Counting in closed form, by shapes and the configuration alone: experts, active parameters, and the root's use.

Decides which share of a mixture's parameters one token uses, and which of the root's tensors head and embedding use
where the model itself has not been asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_empire.model.spec import ModelSpec, TensorSpec, base_name, is_adapter, is_embedding

_EXPERT_KEYS = ("num_local_experts", "n_routed_experts", "num_experts")
_CHOSEN_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")


def experts(text_config: Mapping[str, Any]) -> tuple[int, int]:
    """(experts of a layer, experts that a token is sent to); (0, 1) for a dense model."""
    total = next((int(text_config[k]) for k in _EXPERT_KEYS if text_config.get(k)), 0)
    chosen = next((int(text_config[k]) for k in _CHOSEN_KEYS if text_config.get(k)), 1)
    return total, chosen


def is_stacked(tensor: TensorSpec, total_experts: int) -> bool:
    """Whether a tensor holds the matrices of all experts of a layer, one behind the other."""
    return total_experts > 0 and len(tensor.shape) == 3 and tensor.shape[0] == total_experts


def active_parameters(spec: ModelSpec) -> int:
    """Parameters that one token passes through, adapters left out: of stacked experts, those it is sent to.

    Embeddings count whole.
    """
    total, chosen = experts(spec.text_config)
    tensors = (t for unit in spec.units for t in unit.tensors if not is_adapter(t.name))
    return sum(t.parameters // total * chosen if is_stacked(t, total) else t.parameters for t in tensors)


def root_use(spec: ModelSpec) -> tuple[int, int]:
    """(trainable elements that the head uses, trainable elements that the embedding uses) of the root.

    As the scaled-down model showed (`root_names`), else by shapes and names: a matrix with a row per token of the
    vocabulary is the embedding or the head, and both where there is only one; everything else is the head's.
    """
    head, embed = root_parts(spec)
    return sum(t.size for t in head), sum(t.size for t in embed)


def root_parts(spec: ModelSpec) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The tensors that `root_use` counts, in the root's order."""
    tensors = spec.units[0].tensors
    tied = all(is_embedding(t.name) for t in tensors if len(t.shape) == 2)
    head: list[TensorSpec] = []
    embed: list[TensorSpec] = []
    for tensor in (t for t in tensors if t.trainable):
        if spec.root_names is not None:
            name = base_name(tensor.name)
            of_head, of_embed = name in spec.root_names.head, name in spec.root_names.embed
        else:
            of_embed = len(tensor.shape) == 2 and is_embedding(tensor.name)
            of_head = (tied and not _is_of_positions(tensor.name)) if of_embed else True
        head += [tensor] * of_head
        embed += [tensor] * of_embed
    return head, embed


def looked_up(spec: ModelSpec) -> TensorSpec | None:
    """The trained matrix of which a step needs the rows that tokens look up alone; None where there is none, as where
    the embedding has adapters.

    As the scaled-down model showed, else by names: the embedding's first matrix that is not one of positions.
    """
    _, embed = root_parts(spec)
    if any(is_adapter(t.name) for t in embed):
        return None
    if spec.root_names is not None:
        return next((t for t in embed if base_name(t.name) == spec.root_names.table), None)
    return next((t for t in embed if not _is_of_positions(t.name)), None)


def _is_of_positions(name: str) -> bool:
    return "wpe" in name or "position" in name
