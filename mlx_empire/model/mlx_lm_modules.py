"""How mlx-lm's modules are found: its packages without what they import first, and the classes of a model_type.

`import mlx_lm` imports generation and tokenizers, hence transformers, which reads 1,600 source files twice: most of a
command's start, and 45 MB of every process. A model's module needs none of it. So packages of mlx-lm are entered into
`sys.modules` with their files still to be run, which happens when somebody asks for a name of theirs (`mlx_lm.load`).
`mlx_lm.utils` is imported only where text is read: what puts adapters in wants one function of it, to print with.

Families of our own (`families`) are entered beside mlx-lm's modules, so whoever asks mlx-lm for a model, its loader of
tokenizers too, finds them.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

# As in mlx_lm.utils, where tests look whether it still is so: a model_type whose module has another name ...
REMAPPED: Mapping[str, str] = {
    "mistral": "llama",
    "llava": "mistral3",
    "phi-msft": "phixtral",
    "falcon_mamba": "mamba",
    "joyai_llm_flash": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "qwen2_5_vl": "qwen2_vl",
    "minimax_m2": "minimax",
    "iquestcoder": "llama",
    "xverse": "llama",
    "gemma4_unified": "gemma4",
    "deepseek_v41_text": "deepseek_v41",
}
# ... and one whose architecture decides.
BY_ARCHITECTURE: Mapping[tuple[str, str], str] = {
    ("bailing_hybrid", "BailingMoeV3ForCausalLM"): "bailing_moe_v3",
}
# Families with a model file of our own, in `families`: mlx-lm has none, or one that ends the program (olmo).
OURS = frozenset({"falcon", "olmo"})
# Language models of their own that mlx-lm reads under the name of the vision-language one.
UNDER_ANOTHER_NAME: Mapping[str, str] = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}


class _Late(ModuleType):
    """A module, or a package's `__init__`, that runs when a name is asked for that is not there yet."""

    def __getattr__(self, name: str) -> Any:
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def enter_packages() -> None:
    """Enter mlx-lm's packages and our families into `sys.modules`; what is imported already stays."""
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # as mlx-lm's __init__ does
    for name in ("mlx_lm", "mlx_lm.tuner"):
        _enter(name)
    for family in OURS:
        _enter(f"mlx_empire.model.families.{family}")
        sys.modules[f"mlx_lm.models.{family}"] = sys.modules[f"mlx_empire.model.families.{family}"]


def _enter(name: str) -> None:
    if name not in sys.modules and (spec := find_spec(name)) is not None:
        module = module_from_spec(spec)
        module.__class__ = _Late
        sys.modules[name] = module


def put_adapters_in(model: Any, layers: int, parameters: Mapping[str, Any], use_dora: bool) -> None:
    """mlx-lm's `linear_to_lora_layers`; KeyError or ValueError where the adapters do not fit."""
    late = "mlx_lm.utils" not in sys.modules and "mlx_lm.tuner.utils" not in sys.modules
    if late:
        sys.modules["mlx_lm.utils"] = _Printing("mlx_lm.utils")
    try:
        functions = importlib.import_module("mlx_lm.tuner.utils")
    finally:
        if late:
            del sys.modules["mlx_lm.utils"]
    functions.linear_to_lora_layers(model, layers, dict(parameters), use_dora=use_dora)


class _Printing(ModuleType):
    """Stands for `mlx_lm.utils` while `mlx_lm.tuner.utils` takes functions from it, which are found when called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *given: getattr(importlib.import_module(self.__name__), name)(*given)


def said_of(family: str) -> str:
    """A family's module as a person is told of it."""
    return f"mlx_empire's {family}" if family in OURS else f"mlx-lm's {family}"


def classes_of(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """A model's class and its arguments' dataclass, as `mlx_lm.utils` finds them; ValueError where there is none."""
    kind, given = config["model_type"], config.get("architectures") or ()
    architectures = [given] if isinstance(given, str) else given
    chosen = (BY_ARCHITECTURE[kind, one] for one in architectures if (kind, one) in BY_ARCHITECTURE)
    name = next(chosen, REMAPPED.get(kind, kind))
    try:
        module = importlib.import_module(f"mlx_lm.models.{name}")
    except ImportError as error:
        why = f"Model type {name} not supported."
        if name in UNDER_ANOTHER_NAME:
            why += f" In a copy with model_type: {UNDER_ANOTHER_NAME[name]} in config.json it is."
        raise ValueError(why) from error
    return module.Model, module.ModelArgs
