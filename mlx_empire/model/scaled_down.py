"""A model's architecture with small numbers: what is asked of it takes a second and little memory, even for a model
that no machine holds.

One principle: a configuration counts things of a few kinds (`KINDS`), and all numbers of one kind are divided alike, so
what was equal stays equal and what divided another still divides it:

- counts of heads are divided by one number; a count that divides it becomes 1, which divides everything;
- sizes of a head by one number, after which all are even, and so are their rotary parts; where a GPU fuses attention
  for some sizes only, those become others of them, so that the small model meets the same kernels;
- widths by the product of both, for a width is heads times the size of a head.

Layers, experts, vocabulary, windows and states stand in no such relation to others: they are cut to a small number, and
lists with one entry per layer with them. Everything else (ratios, periods, indices of layers, epsilons) stays as it is.
A tower beside the language model is divided by numbers of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

from mlx_empire.model.build import default_numbers, numbers_of
from mlx_empire.model.config import reader_of

MOST_LAYERS, VOCABULARY = 12, 256
LARGEST_RATIO = 1 << 14  # no published model needs more, and a damaged configuration may hold any number
FEWEST_HEADS, SMALLEST_HEAD, SMALLEST_HIDDEN, SMALLEST_WIDTH = 4, 16, 48, 8

# What a number counts, by its name; the first that matches. A name that matches none stays.
KINDS: dict[str, str] = {
    "layers": r"(num|n)_((hidden|transformer)_)?layers?",
    "layers_at_the_end": r"num_kv_(shared|reuse)_layers",
    "vocabulary": r"vocab_size(_per_layer_input)?|num_vocab",
    "chosen_experts": r".*experts?_per_tok(en)?|moe_(top_?)?k|top_k_experts|n(um)?_shared_experts?",
    "experts": r".*_experts?(_num)?",
    "expert_groups": r"n_group|topk_group|num_expert_group",
    "window": r"(.*_)?window(_size)?|sliding_window_size|(.*_)?chunk_size|n_ctx",
    "state": r".*state_size|.*_d_state|time_step_rank|.*_dt_rank",
    "head": r".*head_dim|.*_d_head|hidden_size_per_head|kv_channels|rotary_dim",
    "heads": r"(.*_)?heads?(_kv|_per_layer|_in_group)?|(mamba_)?n_groups|num_attention_groups|group_norm_size",
    "scale": r"query_pre_attn_scalar",  # the size of a head that scores are scaled by, not always a whole one
    "width": r".*(hidden|intermediate|embedding|latent)_size(_mlp|_per_layer_input)?|n_embd|n_inner|d_model|d_inner"
    r"|.*_d_ssm|.*_rank|(?!.*kernel).*_dim|dim_model_base|block_multiple_of|ffn_dim_divisor",
}
AT_MOST = {"chosen_experts": 2, "experts": 4, "expert_groups": 1, "window": 32, "state": 16}
HIDDEN = ("hidden_size", "n_embd", "d_model", "model_dim", "hidden_dim")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
ROTATED = re.compile(r".*partial_rotary_factors?|rotary_pct")  # the part of a head that RoPE rotates
ROPE = ("rope_scaling", "rope_parameters")
ASIDE = (*ROPE, "quantization", "quantization_config")
TOWER = re.compile(r".*(vision|visual|audio|image|video).*")
WHOLE_VOCABULARY = ("phi3small",)  # writes to logits by their numbers: with fewer, past the end of them


def kind_of(name: str) -> str | None:
    """What the number called `name` counts; None for what is not divided."""
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, name)), None)


@dataclass(frozen=True)
class Ratios:
    """By what the numbers of a configuration are divided; `layers`: how many it has (0: it does not say)."""

    layers: int
    heads: int
    head: int
    width: int
    vocabulary: bool = True  # whether it is cut

    def small(self, name: str, value: int | float) -> int | float:
        """The small number in place of `value`."""
        kind = kind_of(name)
        if kind == "layers":
            return min(value, MOST_LAYERS)
        if kind == "layers_at_the_end":
            return -(-value * min(self.layers, MOST_LAYERS) // max(self.layers, 1))
        if kind == "vocabulary":
            return VOCABULARY if self.vocabulary else value
        if kind == "heads":
            return max(value // self.heads, min(value, 1))
        if kind == "head":
            return value // self.head
        if kind == "scale":
            return value / self.head
        if kind == "width":
            return max(-(-value // self.width), min(value, SMALLEST_WIDTH))
        return min(value, AT_MOST[kind]) if kind else value


def scaled_down_config(
    config: Mapping[str, Any], *, whole_vocabulary: bool = False, fused: Collection[int] = ()
) -> dict[str, Any]:
    """The same architecture with small numbers, also those that the configuration leaves to mlx-lm's defaults.

    `whole_vocabulary`: it keeps the model's own, for text that is tokenised for it. `fused`: the sizes of a head that a
    GPU has kernels for; a head is of such a size in the small model where it is in the large one, and only there.
    """
    config = _with_defaults(config)
    cut = not whole_vocabulary and config.get("model_type") not in WHOLE_VOCABULARY
    small = _scaled(config, replace(_ratios(config, fused), vocabulary=cut))
    for key, value in config.items():
        if TOWER.fullmatch(key) and isinstance(value, Mapping):
            small[key] = _scaled(value, _ratios(value, fused))
    return small


def first_layers(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The same model with its first `count` layers alone: nothing else is small."""
    config = _with_defaults(config)
    layers = max((value for name, value in _numbers(config) if kind_of(name) == "layers"), default=0)

    def cut(key: str, value: Any) -> Any:
        if TOWER.fullmatch(key):
            return value
        if isinstance(value, Mapping):
            return {name: cut(name, one) for name, one in value.items()}
        by_layer = isinstance(value, list) or (isinstance(value, str) and key.endswith("_pattern"))
        if by_layer and len(value) == layers:
            return value[:count]
        return min(value, count) if kind_of(key) == "layers" and isinstance(value, int) else value

    return {key: cut(key, value) for key, value in config.items()}


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    whole, text = dict(config), config.get("text_config")
    if (reader := reader_of(config)) is not None:
        told = {k: v for k, v in numbers_of(reader[1].values()).items() if kind_of(k)}
        if not isinstance(text, Mapping):
            return {**told, **whole}
        whole["text_config"] = {**told, **text}
    return {**{k: v for k, v in default_numbers(config).items() if kind_of(k)}, **whole}


def _ratios(config: Mapping[str, Any], fused: Collection[int]) -> Ratios:
    numbers = [(name, kind_of(name), value) for name, value in _numbers(config) if value > 0]

    def of(kind: str) -> list[int]:
        return [value for _, found, value in numbers if found == kind]

    def first(names: tuple[str, ...]) -> int:
        return next((value for name in names for key, _, value in numbers if key == name), 0)

    hidden, count, heads, sizes = first(HIDDEN), first(HEADS), of("heads"), of("head")
    if count and hidden % count == 0:
        sizes.append(hidden // count)  # what most modules take where none is given
    parts = [1, *_rotated(config)]

    def sizes_allow(d: int) -> bool:
        even = all(s % (2 * d) == 0 and int(s // d * part) % 2 == 0 for s in sizes for part in parts)
        same_kernels = not fused or all((s in fused) == (s // d in fused) for s in sizes)
        return even and same_kernels and max(sizes) >= SMALLEST_HEAD * d and min(sizes) >= SMALLEST_WIDTH * d

    def widths_allow(d: int) -> bool:
        return hidden % d == 0 and hidden >= SMALLEST_HIDDEN * d

    head = _largest(gcd(*sizes), sizes_allow)

    def heads_allow(d: int) -> bool:
        divided = not any(h % d and d % h for h in heads) and max(heads) >= FEWEST_HEADS * d
        return divided and widths_allow(d * head)

    by_heads = _largest(max(heads, default=1), heads_allow)
    width = by_heads * head if heads and sizes else _largest(hidden, widths_allow)
    return Ratios(max(of("layers"), default=0), by_heads, head, width)


def _largest(of: int, allowed: Callable[[int], bool]) -> int:
    """The largest divisor of a number that is allowed; 1 where none is."""
    return next((d for d in range(min(of, LARGEST_RATIO), 1, -1) if of % d == 0 and allowed(d)), 1)


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Whole numbers of the language model by name, those of lists and of nested parts too."""
    for key, value in config.items():
        if key in ASIDE or TOWER.fullmatch(key):
            continue
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Mapping):
                yield from _numbers(one)
            elif isinstance(one, int) and not isinstance(one, bool):
                yield key, one


def _rotated(config: Mapping[str, Any]) -> Iterator[float]:
    """Every rotary part of a head, wherever it is written."""
    for key, value in config.items():
        if isinstance(value, Mapping) and not TOWER.fullmatch(key):
            yield from _rotated(value)
        elif ROTATED.fullmatch(key):
            values = value if isinstance(value, list) else [value]
            yield from (v for v in values if isinstance(v, int | float) and 0 <= v <= 1)


def _scaled(config: Mapping[str, Any], ratios: Ratios) -> dict[str, Any]:
    return {key: _small(key, value, ratios) for key, value in config.items()}


def _small(key: str, value: Any, ratios: Ratios) -> Any:
    if key in ROPE and isinstance(value, Mapping):
        return _one_factor(value)
    if key in ASIDE or isinstance(value, bool) or value is None:
        return value
    if isinstance(value, Mapping):
        return _scaled(value, ratios)
    by_layer = isinstance(value, list) or (isinstance(value, str) and key.endswith("_pattern"))
    if by_layer and len(value) == ratios.layers:
        value = value[:MOST_LAYERS]
    if isinstance(value, list):
        return [_small(key, one, ratios) for one in value]
    return ratios.small(key, value) if isinstance(value, int | float) else value


def _one_factor(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Of a list with a factor for each rotary dimension the first for all (fewer here). Also in layer types."""
    small = dict(rope)
    for key, value in rope.items():
        if isinstance(value, Mapping):
            small[key] = _one_factor(value)
        elif isinstance(value, list) and value and key.endswith("_factor"):
            small[key] = value[0]
    return small
