"""Counting what is not built or run: families that mlx-lm lacks, experts, active parameters, and the root's use.

Decides which families have a closed form (Falcon, OLMo 1), which share of a mixture's parameters one token uses, and
which of the root's tensors head and embedding use where the model itself has not been asked.

Of such a family's model `module_of` makes a module with its tensors, so that adapters and packing do to it what they
do to others. It has shapes and names only, and cannot be called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_empire.errors import UserError
from mlx_empire.model.spec import ModelSpec, TensorSpec, UnitSpec, base_name, is_adapter, is_embedding

_EXPERT_KEYS = ("num_local_experts", "n_routed_experts", "num_experts")
_CHOSEN_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")
Shapes = list[tuple[str, tuple[int, ...]]]


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


def has_closed_form(config: Mapping[str, Any]) -> bool:
    """Whether `counted_spec` knows the family: one that mlx-lm cannot build."""
    return config.get("model_type") in _LAYERS


def counted_spec(config: Mapping[str, Any], name: str, dtype: str) -> ModelSpec:
    """The model as numbers, from its configuration alone. UserError where the configuration is damaged."""
    kind = str(config["model_type"])
    try:
        count, (root, layer) = int(config["num_hidden_layers"]), _LAYERS[kind](config)
        if count < 1 or any(d < 1 for _, shape in root + layer for d in shape):
            raise ValueError("a size is not positive")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{name}: config.json of {kind} cannot be counted: {error}; fetch the model again"
        ) from None
    units = [_unit("root", root, dtype)]
    units += [_unit(f"model.layers.{i}", layer, dtype) for i in range(count)]
    return ModelSpec(name, kind, dtype, tuple(units), dict(config))


def _unit(name: str, shapes: Shapes, dtype: str) -> UnitSpec:
    prefix = "model" if name == "root" else name
    return UnitSpec(name, tuple(TensorSpec(f"{prefix}.{n}", shape, dtype) for n, shape in shapes))


def _falcon(config: Mapping[str, Any]) -> tuple[Shapes, Shapes]:
    """Falcon: fused query-key-value, tied head, one or two layer norms with bias (two in the new architecture)."""
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    width = hidden // heads
    new = bool(config.get("new_decoder_architecture"))
    groups = int(config.get("num_kv_heads") or heads) if new else 1 if config.get("multi_query") else heads
    rows = (heads + 2 * groups) * width
    inner = int(config.get("ffn_hidden_size") or config.get("intermediate_size") or 4 * hidden)
    norms = ("ln_attn", "ln_mlp") if new else ("input_layernorm",)
    layer: Shapes = [
        ("self_attention.query_key_value.weight", (rows, hidden)),
        ("self_attention.dense.weight", (hidden, hidden)),
        ("mlp.dense_h_to_4h.weight", (inner, hidden)),
        ("mlp.dense_4h_to_h.weight", (hidden, inner)),
    ]
    if not new and not config.get("parallel_attn", True):
        norms = ("input_layernorm", "post_attention_layernorm")
    layer += [(f"{norm}.{part}", (hidden,)) for norm in norms for part in ("weight", "bias")]
    if config.get("bias"):
        layer += [
            ("self_attention.query_key_value.bias", (rows,)),
            ("self_attention.dense.bias", (hidden,)),
            ("mlp.dense_h_to_4h.bias", (inner,)),
            ("mlp.dense_4h_to_h.bias", (hidden,)),
        ]
    vocabulary = int(config["vocab_size"])
    root: Shapes = [("embed_tokens.weight", (vocabulary, hidden))]
    root += [(f"norm.{part}", (hidden,)) for part in ("weight", "bias")]
    if config.get("tie_word_embeddings") is False:
        root.append(("lm_head.weight", (vocabulary, hidden)))
    return root, layer


def _olmo(config: Mapping[str, Any]) -> tuple[Shapes, Shapes]:
    """OLMo 1: Llama's matrices, layer norms without parameters."""
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    keys = int(config.get("num_key_value_heads") or heads) * (hidden // heads)
    inner, vocabulary = int(config["intermediate_size"]), int(config["vocab_size"])
    layer: Shapes = [
        ("self_attn.q_proj.weight", (hidden, hidden)),
        ("self_attn.k_proj.weight", (keys, hidden)),
        ("self_attn.v_proj.weight", (keys, hidden)),
        ("self_attn.o_proj.weight", (hidden, hidden)),
        ("mlp.gate_proj.weight", (inner, hidden)),
        ("mlp.up_proj.weight", (inner, hidden)),
        ("mlp.down_proj.weight", (hidden, inner)),
    ]
    if config.get("attention_bias"):
        widths = {"q_proj": hidden, "k_proj": keys, "v_proj": keys, "o_proj": hidden}
        layer += [(f"self_attn.{name}.bias", (width,)) for name, width in widths.items()]
    root: Shapes = [("embed_tokens.weight", (vocabulary, hidden))]
    if not config.get("tie_word_embeddings"):
        root.append(("lm_head.weight", (vocabulary, hidden)))
    return root, layer


_LAYERS: Mapping[str, Callable[[Mapping[str, Any]], tuple[Shapes, Shapes]]] = {
    "falcon": _falcon,
    "olmo": _olmo,
}


class _Counted(nn.Module):
    """The root of such a model, with its layers where describing looks for them."""

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        found: list[nn.Module] = self.model.layers
        return found


def module_of(spec: ModelSpec) -> nn.Module:
    """mlx's own modules for the tensors of `spec` (`<path>.weight`, `<path>.bias`), lazily.

    A matrix belongs to an embedding (by its name, in the root alone) or a linear module; a vector is only held.
    """
    model = _Counted()
    for unit in spec.units:
        for tensor in unit.tensors:
            stem, _, leaf = tensor.name.rpartition(".")
            *path, last = stem.split(".")
            owner: nn.Module = model
            for i, part in enumerate(path):
                if part.isdigit():
                    continue
                if i + 1 < len(path) and path[i + 1].isdigit():
                    row = owner.setdefault(part, [])
                    while len(row) <= int(path[i + 1]):
                        row.append(nn.Module())
                    owner = row[int(path[i + 1])]
                else:
                    owner = owner.setdefault(part, nn.Module())
            if leaf == "weight" and len(tensor.shape) == 2:
                root = unit is spec.units[0] and is_embedding(stem)
                kind = nn.Embedding(*tensor.shape) if root else nn.Linear(*tensor.shape[::-1], bias=False)
                owner[last] = kind
            else:
                owner.setdefault(last, nn.Module())[leaf] = mx.zeros(tensor.shape)
    return model
