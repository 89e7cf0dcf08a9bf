"""Keys of a configuration in the names that mlx-lm's module of the family reads, RoPE excepted (rope.py).

transformers and mlx-lm call the same number by two names, derive it from others, or assume another value where it is
missing. Decides for each key that the module reads and the configuration lacks what it is; and refuses by name what
the module cannot do, because mlx-lm leaves it out without a word (unread.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field
from typing import Any

from mlx_empire.errors import UserError
from mlx_empire.model.family_defaults import OTHERS
from mlx_empire.model.unread import refuse_unread_keys

Fields = Mapping[str, Field[Any]]
FULL = "full_attention"

Numbers = Mapping[str, Any]

# A key that modules of mlx-lm read, and what transformers calls the same.
ALIASES: Mapping[str, str] = {
    "num_experts": "num_local_experts",
    "n_ctx": "n_positions",
    "block_dim": "hidden_size",
}
# ... and how it follows from others where it is missing; whatever is raised says that it cannot be known.
DERIVED: Mapping[str, Callable[[Numbers], Any]] = {
    "head_dim": lambda c: c["hidden_size"] // c["num_attention_heads"],
    "first_k_dense_replace": lambda c: _leading("dense", "sparse", c["mlp_layer_types"]),
    "is_moe_layer": lambda c: [kind == "sparse" for kind in c["mlp_layer_types"]],
}
GRANITE_KINDS = {FULL: "attention", "linear_attention": "mamba"}  # as transformers 5 writes them
# The same for one module; here a key that is there is overwritten, for transformers reads the other one.
OF_MODULE: Mapping[str, Mapping[str, Callable[[Numbers], Any]]] = {
    "granitemoehybrid": {
        "layer_types": lambda c: [GRANITE_KINDS.get(kind, kind) for kind in c["layer_types"]],
        # without experts a layer is the one MLP that is shared with them
        "intermediate_size": lambda c: c[
            "intermediate_size" if c["num_local_experts"] else "shared_intermediate_size"
        ],
        "position_embedding_type": lambda c: "rope" if c.get("position_embedding_type") == "rope" else "nope",
    },
    "lfm2": {"full_attn_idxs": lambda c: _indices(FULL, c["layer_types"])},
    "lfm2_moe": {"full_attn_idxs": lambda c: _indices(FULL, c["layer_types"])},
    "mamba2": {"intermediate_size": lambda c: int(c["expand"] * c["hidden_size"])},
    "minimax": {"rotary_dim": lambda c: int(c["head_dim"] * _partial(c))},
}


def _indices(kind: str, kinds: Sequence[str]) -> list[int]:
    return [i for i, one in enumerate(kinds) if one == kind]


def _leading(first: str, rest: str, kinds: Sequence[str]) -> int:
    """How many layers at the beginning are of the first kind, where all others are of the rest's; else ValueError."""
    count = list(kinds).count(first)
    if list(kinds) != [first] * count + [rest] * (len(kinds) - count):
        raise ValueError("not the first layers")
    return count


# Keys that say whether there are biases, and the tensors that show it.
BIASES: Mapping[str, str] = {"attention_bias": ".q_proj.bias", "mamba_conv_bias": ".conv1d.bias"}


def spell_keys(
    section: dict[str, Any], fields: Fields, module: str, family: str, where: str, stored: Collection[str]
) -> None:
    """Add to `section` what `module` reads and it lacks; UserError for what the module would leave out.

    `fields`: those of the dataclass that mlx-lm reads it into; `family`: its own model_type; `stored`: the folder's
    tensors, as far as they are known.
    """
    defaults = OTHERS.get(family, {})
    for key, field in fields.items():
        if section.get(key) is not None:
            continue
        if key in ALIASES and section.get(ALIASES[key]) is not None:
            section[key] = section[ALIASES[key]]
        elif key in defaults:
            if key not in section:  # null is a value of its own
                section[key] = _as_stored(key, defaults[key], stored)
        elif key in DERIVED and (field.default is MISSING or field.default is not None):
            _derive(section, key, DERIVED[key])
    for key, rule in OF_MODULE.get(module, {}).items():
        _derive(section, key, rule)
    _spell_layers(section, fields, where)
    refuse_unread_keys(section, module, where, stored)


def _as_stored(key: str, default: Any, stored: Collection[str]) -> Any:
    """transformers' default, unless the folder's tensors say otherwise: others leave out what is mlx-lm's default."""
    if key in BIASES and default and stored:
        return any(name.endswith(BIASES[key]) for name in stored)
    return default


def _derive(section: dict[str, Any], key: str, rule: Callable[[Numbers], Any]) -> None:
    try:
        section[key] = rule(section)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return  # mlx-lm says what it lacks


def _partial(section: Numbers) -> float:
    rope = section.get("rope_parameters") or {}
    return float(section.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0)


def _spell_layers(section: dict[str, Any], fields: Fields, where: str) -> None:
    """The period of the layers with full attention from the `layer_types` that transformers 5 writes, where the
    module reads the former. UserError for layers without a period.

    A number: every so many layers one has full attention; exaone4: that as letters.
    """
    types = section.get("layer_types")
    key = next((k for k in ("sliding_window_pattern", "full_attention_interval") if k in fields), None)
    if key is None or "layer_types" in fields or not isinstance(types, list) or FULL not in types:
        return
    period = types.index(FULL) + 1
    if any((kind == FULL) != ((i + 1) % period == 0) for i, kind in enumerate(types)):
        raise UserError(f"{where}: layer_types: {types}: mlx-lm's module repeats one pattern in all layers")
    letters: str | None = "L" * (period - 1) + "G"
    if period == 1 and section.get("sliding_window") is None:
        letters = None  # no window anywhere: exaone4 has no pattern then, and turns every layer
    given = section.get(key)
    if given not in (None, period, letters):
        raise UserError(f"{where}: {key}: {given}: layer_types says {period}; keep one of them")
    if given is None or given != letters:
        section[key] = letters if key.endswith("pattern") and fields[key].default is MISSING else period
