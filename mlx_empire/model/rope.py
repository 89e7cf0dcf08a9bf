"""RoPE: what a configuration says about it, in the spelling that mlx-lm's module of the family reads.

transformers 5 writes one `rope_parameters` (flat, or one for each type of layer); before it, and in mlx-lm, there are
`rope_theta`, `rope_scaling` and `partial_rotary_factor`. Decides what each module can express; what it cannot is
refused by name, because mlx-lm would leave it out without a word. The folder's own keys stay beside the added ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field
from typing import Any, NoReturn

from mlx_empire.errors import UserError
from mlx_empire.model.family_defaults import ROPE
from mlx_empire.model.mlx_lm_modules import said_of

Config = Mapping[str, Any]
Fields = Mapping[str, Field[Any]]

THETA_NAMES = ("rope_theta", "rotary_emb_base")
PARTIAL_NAMES = ("partial_rotary_factor", "rotary_pct")
LOCAL_THETA_NAMES = ("rope_local_base_freq", "swa_rope_theta", "rope_local_theta")
LAYER_TYPES = ("full_attention", "sliding_attention")

PLAIN = ("default", "mrope")  # a text's positions are the same in all sections of mrope
YARN = ("yarn", "deepseek_yarn", "telechat3-yarn")
SHARED = ("linear", "dynamic", "llama3", "longrope", "proportional", *YARN)  # mlx-lm's rope_utils
SCALING_KEYS = frozenset(
    {
        "factor",
        "original_max_position_embeddings",
        "max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "short_factor",
        "long_factor",
        "low_freq_factor",
        "high_freq_factor",
    }
)
IGNORED_KEYS = frozenset({"mrope_section", "mrope_interleaved"})
OWN_KEYS: Mapping[str, frozenset[str]] = {
    "hunyuan": frozenset({"alpha"}),
    "hunyuan_v1_dense": frozenset({"alpha"}),
    "ministral3": frozenset({"llama_4_scaling_beta"}),
    "mistral4": frozenset({"llama_4_scaling_beta"}),
    "phimoe": frozenset({"short_mscale", "long_mscale"}),
}

# Modules that declare rope_scaling and apply less than rope_utils does; () where they never look at it.
SCALINGS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("gemma3n", "glm4_moe", "kimi_linear", "mixtral", "qwen2_moe", "qwen3_moe"), ()),
    **dict.fromkeys(("deepseek", "nemotron"), ("linear",)),
    **dict.fromkeys(("hunyuan", "hunyuan_v1_dense"), ("dynamic",)),
    **dict.fromkeys(("internlm2", "internlm3"), ("linear", "dynamic")),
    **dict.fromkeys(("minicpm3", "phi3", "phimoe"), ("longrope",)),
    "deepseek_v2": YARN,
}
WHOLE = frozenset({"ministral3", "minimax_m3_vl"})  # scale by rope_parameters, without a rope_scaling
FIXED_THETA: Mapping[str, float] = {"recurrent_gemma": 10_000.0}
FIXED_PARTIAL: Mapping[str, float] = {"recurrent_gemma": 0.5}
GLOBAL_SCALING = frozenset({"olmo3"})  # scales the layers with full attention only
ALWAYS_YARN = frozenset({"deepseek_v2"})  # cannot be built without; by a factor of 1 it changes nothing
ROUNDS_YARN = frozenset({"gpt_oss"})  # mlx-lm rounds yarn's limits, which `truncate: false` asks not to


def spell_rope(section: Config, fields: Fields, module: str, where: str) -> dict[str, Any]:
    """`section` with the keys that `module` reads; `fields` are those of the dataclass that mlx-lm reads it into.

    UserError where the two spellings contradict each other, or the module cannot do what is asked.
    """
    speaker = _Speaker(module, where)
    given = section.get("rope_parameters")
    default = ROPE.get(str(section.get("model_type")), {})
    if given is not None and not isinstance(given, Mapping):
        speaker.refuse("rope_parameters", given, "needs a mapping")
    if given and any(isinstance(value, Mapping) or value is None for value in given.values()):
        return _per_layer(section, fields, given, default, speaker)
    if not given and _is_per_layer(default):
        if _must_have_parameters(fields):
            return {**section, "rope_parameters": {k: dict(v) for k, v in default.items()}}
        local = next((name for name in LOCAL_THETA_NAMES if name in fields), None)
        if local is not None:
            section = {local: default["sliding_attention"]["rope_theta"], **section}
        default = default["full_attention"]
    rope = _merged(section, given or {}, default, speaker)
    return _written(section, fields, rope, speaker)


class _Speaker:
    """Says what is refused, and where."""

    def __init__(self, module: str, where: str) -> None:
        self.module, self.where = module, where

    def refuse(self, key: str, value: object, why: str) -> NoReturn:
        raise UserError(f"{self.where}: {key}: {str(value)[:80]}: {why}")

    def cannot(self, key: str, value: object) -> NoReturn:
        self.refuse(
            key, value, f"{said_of(self.module)} would leave it out, so the model would be another one"
        )


def _is_per_layer(parameters: Config) -> bool:
    return any(isinstance(value, Mapping) for value in parameters.values())


def _must_have_parameters(fields: Fields) -> bool:
    """Whether the module reads rope_parameters and falls back on nothing else that a configuration holds."""
    field = fields.get("rope_parameters")
    return field is not None and ("rope_theta" not in fields or field.default is not None)


def _canonical(parameters: Config, speaker: _Speaker, strict: bool) -> dict[str, Any]:
    """One spelling of the type, no empty keys; `strict` refuses keys that nobody knows."""
    found = {k: v for k, v in parameters.items() if v is not None and k not in (*IGNORED_KEYS, "type")}
    kinds = [parameters[k] for k in ("rope_type", "type") if parameters.get(k) is not None]
    if len({_alias(kind) for kind in kinds}) > 1:
        speaker.refuse("rope type", " and ".join(map(str, kinds)), "contradict each other; keep one")
    if kinds:
        found["rope_type"] = _alias(kinds[0])
    known = SCALING_KEYS | OWN_KEYS.get(speaker.module, frozenset())
    for key in found.keys() - known - {"rope_type", "rope_theta", "partial_rotary_factor"} if strict else ():
        speaker.refuse(f"rope_parameters.{key}", found[key], f"{said_of(speaker.module)} knows no such key")
    return found


def _alias(kind: object) -> str:
    return {"su": "longrope", "mrope": "default"}.get(str(kind), str(kind))


def _merged(section: Config, given: Config, default: Config, speaker: _Speaker) -> dict[str, Any]:
    """Both spellings as one flat mapping, completed by transformers' defaults; {} where the family has no RoPE."""
    new = _canonical(given, speaker, strict=True)
    scaling = section.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, Mapping):
        speaker.refuse("rope_scaling", scaling, "needs a mapping")
    old = _canonical(scaling or {}, speaker, strict=False)
    for key, names in (("rope_theta", THETA_NAMES), ("partial_rotary_factor", PARTIAL_NAMES)):
        for name in names:
            if section.get(name) is not None:
                old[key] = section[name]
    attention = section.get("attn_config")
    if speaker.module == "dbrx" and isinstance(attention, Mapping) and "rope_theta" in attention:
        old["rope_theta"] = attention["rope_theta"]
    for key in sorted(new.keys() & old.keys()):
        if new[key] != old[key]:
            speaker.refuse(
                f"rope_parameters.{key}", new[key], f"the older spelling says {old[key]}; keep one of them"
            )
    rope = {**old, **new}
    if not rope:
        return _canonical(default, speaker, strict=False)
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in default:
            rope.setdefault(key, default[key])
    return rope


def _written(section: Config, fields: Fields, rope: dict[str, Any], speaker: _Speaker) -> dict[str, Any]:
    """`section` with a flat `rope` in the module's own keys."""
    out = dict(section)
    _write_theta(out, fields, rope, speaker)
    _write_partial(out, fields, rope, speaker)
    kind = rope.get("rope_type", "default")
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type", "partial_rotary_factor")}
    if kind in PLAIN and speaker.module in ALWAYS_YARN and not section.get("rope_scaling"):
        kind, scaling = "yarn", {"factor": 1.0}
    if "rope_scaling" in fields and fields["rope_scaling"].default is MISSING:
        out.setdefault("rope_scaling", None)
    if kind not in PLAIN:
        if kind not in SCALINGS.get(speaker.module, SHARED):
            speaker.cannot("rope_type", kind)
        if "rope_scaling" not in fields and speaker.module not in WHOLE:
            speaker.cannot("rope_type", kind)
        _refuse_unread(kind, scaling, section, speaker)
        if "rope_scaling" in fields:
            out["rope_scaling"] = {"type": kind, "rope_type": kind, **scaling}
            if (
                "partial_rotary_factor" in rope
            ):  # transformers drops rope_parameters where it finds a rope_scaling
                out.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
        if "original_max_position_embeddings" in fields and "original_max_position_embeddings" in scaling:
            _write_original(out, scaling, speaker)
    if rope and not section.get("rope_parameters") and _must_have_parameters(fields):
        out["rope_parameters"] = {"rope_type": kind, **rope}
    return out


def _write_original(out: dict[str, Any], scaling: Config, speaker: _Speaker) -> None:
    name = "original_max_position_embeddings"
    if out.setdefault(name, scaling[name]) != scaling[name]:
        speaker.refuse(f"rope_parameters.{name}", scaling[name], f"{name} says {out[name]}; keep one of them")


def _write_theta(out: dict[str, Any], fields: Fields, rope: Config, speaker: _Speaker) -> None:
    theta = rope.get("rope_theta")
    if theta is None:
        return
    numbers = theta if isinstance(theta, list) else [theta]
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and x > 0 for x in numbers):
        speaker.refuse("rope_theta", theta, "needs a positive number")
    name = next((n for n in THETA_NAMES if n in fields), None)
    if FIXED_THETA.get(speaker.module, theta) != theta:
        speaker.cannot("rope_theta", theta)
    if name is not None:
        out[name] = theta
    elif speaker.module == "dbrx" and isinstance(out.get("attn_config"), Mapping):
        out["attn_config"] = {**out["attn_config"], "rope_theta": theta}
    elif "rope_parameters" not in fields and out.get("rope_parameters"):
        speaker.cannot("rope_theta", theta)


def _write_partial(out: dict[str, Any], fields: Fields, rope: Config, speaker: _Speaker) -> None:
    partial = rope.get("partial_rotary_factor")
    if partial is None:
        return
    name = next((n for n in PARTIAL_NAMES if n in fields), None)
    if name is not None:
        out[name] = partial
    elif "rotary_dim" in fields and out.get("head_dim"):
        rotated = int(out["head_dim"] * partial)
        if out.setdefault("rotary_dim", rotated) != rotated:
            speaker.refuse("partial_rotary_factor", partial, f"rotary_dim says {out['rotary_dim']}; keep one")
    elif "qk_rope_head_dim" not in fields and FIXED_PARTIAL.get(speaker.module, 1.0) != partial:
        speaker.cannot("partial_rotary_factor", partial)


def _refuse_unread(kind: str, scaling: Config, section: Config, speaker: _Speaker) -> None:
    """UserError where transformers' factor on queries and keys is not the one that mlx-lm derives, or yarn's limits."""
    factor = float(scaling.get("factor") or 1.0)
    original = scaling.get("original_max_position_embeddings")
    longest = section.get("max_position_embeddings")

    def grown(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    def stretched(by: float) -> float:
        return math.sqrt(1 + math.log(by) / math.log(original or 2)) if by > 1.0 else 1.0

    asked = done = 1.0
    if kind in YARN:
        mscale, everywhere = scaling.get("mscale"), scaling.get("mscale_all_dim")
        asked = grown(mscale) / grown(everywhere) if mscale and everywhere else grown(1.0)
        done = grown(1.0 if mscale is None else mscale) / grown(everywhere or 0.0)
        if scaling.get("truncate") is False and speaker.module not in ROUNDS_YARN:
            speaker.cannot("rope_parameters.truncate", False)
    elif kind == "longrope" and speaker.module != "phimoe" and original and longest:
        done = stretched(longest / original)
        asked = stretched(scaling["factor"]) if scaling.get("factor") else done
    asked = scaling.get("attention_factor", asked)
    if not math.isclose(asked, done, rel_tol=1e-3):
        speaker.cannot("rope_parameters: factor on queries and keys", f"{asked:g}, not {done:g}")


def _per_layer(
    section: Config, fields: Fields, given: Config, default: Config, speaker: _Speaker
) -> dict[str, Any]:
    """`section` whose rope_parameters has a mapping for each type of layer."""
    for key, value in given.items():
        if value is not None and not isinstance(value, Mapping):
            speaker.refuse(f"rope_parameters.{key}", value, "stands beside layer types; move it into them")
    if _must_have_parameters(fields):
        return dict(section)  # such a module reads the mapping of each type of layer itself
    kinds = {k: _canonical(v, speaker, strict=True) for k, v in given.items() if v is not None}
    if not kinds or len(kinds) < len(given):
        speaker.cannot("rope_parameters", given)
    if all(value == next(iter(kinds.values())) for value in kinds.values()):
        full = sliding = next(iter(kinds.values()))
    elif kinds.keys() == set(LAYER_TYPES):
        full, sliding = (kinds[name] for name in LAYER_TYPES)
    else:
        speaker.cannot("rope_parameters", given)
    local = next((name for name in LOCAL_THETA_NAMES if name in fields), None)
    same_but_scaling = (
        sliding.get("rope_theta") == full.get("rope_theta")
        and sliding.get("rope_type", "default") == "default"
        and speaker.module in GLOBAL_SCALING
    )
    whole = default.get("full_attention", default) if _is_per_layer(default) else default
    out = _written(section, fields, _merged(section, full, whole, speaker), speaker)
    if local is not None:
        if sliding.get("rope_type", "default") != "default":
            speaker.cannot("rope_parameters.sliding_attention.rope_type", sliding["rope_type"])
        if sliding.get("partial_rotary_factor") != full.get("partial_rotary_factor"):
            speaker.cannot("rope_parameters.sliding_attention.partial_rotary_factor", sliding)
        theta = sliding.get("rope_theta")
        if theta is not None and out.setdefault(local, theta) != theta:
            speaker.refuse(
                "rope_parameters.sliding_attention.rope_theta", theta, f"{local} says {out[local]}"
            )
    elif sliding != full and not same_but_scaling:
        speaker.cannot("rope_parameters.sliding_attention", sliding)
    return out
