"""What a model is made of, as numbers: tensors grouped into units, the things that are gathered together.

Unit 0 is the *root* (embedding, final norm, head and whatever else is no layer); units 1..L are the layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

BLOCK = 64  # elements; tensors start and intervals end on multiples of it (the optimizer's block)
SMALL_ELEMENTS = 4096  # below this a tensor keeps fp32 weights and states
ADAPTER_NAMES = frozenset({"lora_a", "lora_b", "m"})  # mlx-lm's; `m` is DoRA's magnitude
SCALE_OFFSETS = "scale_offsets"  # what a ternary module learns beside its weight (`ternary`)
EMBEDDING_NAMES = ("embed", "wte", "wpe", "word_embeddings")
ROUTER_NAMES = frozenset({"router", "gate", "shared_expert_gate"})
_OWN = re.compile(r"\.daughters\.(\d+)\.")

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int16": 2, "uint32": 4, "uint8": 1, "int8": 1}


@dataclass(frozen=True)
class TensorSpec:
    """One parameter: `name` is its path in the mlx-lm model, `dtype` the dtype it computes in.

    `bits`: of one code in a packed matrix; `group`: inputs that share an element of its scales or biases; else 0.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool = True
    bits: int = 0
    group: int = 0

    @cached_property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def parameters(self) -> int:
        """Number of the model's parameters in it: a packed matrix holds one for each code, its scales none."""
        if self.group:
            return 0
        return self.size * 32 // self.bits if self.bits else self.size

    @cached_property
    def padded_size(self) -> int:
        """Number of elements rounded up to whole blocks of 64."""
        return -(-self.size // BLOCK) * BLOCK

    @property
    def kind(self) -> str:
        """The segment it belongs to: `trainable`, `small` (fp32 weights and states) or `frozen`."""
        if not self.trainable:
            return "frozen"
        small = len(self.shape) < 2 or self.size < SMALL_ELEMENTS or is_router(self.name)
        return "small" if small else "trainable"


@dataclass(frozen=True)
class UnitSpec:
    """The tensors that are gathered together: the root or one layer."""

    name: str
    tensors: tuple[TensorSpec, ...]

    @property
    def parameters(self) -> int:
        """Number of parameters of all tensors, frozen ones included."""
        return sum(t.parameters for t in self.tensors)

    @cached_property
    def structure(self) -> tuple[tuple[str, tuple[int, ...], str, bool], ...]:
        """What layers of one kind have in common: their tensors without the unit's own name."""
        return tuple((t.name.removeprefix(self.name), t.shape, t.dtype, t.trainable) for t in self.tensors)

    @cached_property
    def kind(self) -> int:
        """A hash of the structure."""
        return hash(self.structure)


@dataclass(frozen=True)
class RootNames:
    """Names of the root's parameters, without adapters, that the head depends on, and those that the embedding does.

    `table`: the one of the latter of which the rows that tokens look up are enough; None where there is none.
    """

    head: tuple[str, ...]
    embed: tuple[str, ...]
    table: str | None


@dataclass(frozen=True)
class ModelSpec:
    """A model as numbers: its name, the family (mlx-lm's module), units and the configuration it came from.

    `root_names`: what the scaled-down model showed of the root; None where nobody has asked it. `module`: mlx-lm's, to
    trace its layers; it may be in use.
    """

    name: str
    family: str
    dtype: str
    units: tuple[UnitSpec, ...]
    config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    root_names: RootNames | None = field(default=None, repr=False, compare=False)
    module: Any = field(default=None, repr=False, compare=False)

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model, adapters included, however they are stored."""
        return sum(u.parameters for u in self.units)

    @cached_property
    def base_parameters(self) -> int:
        """Number of parameters of the model itself, without adapters and what ternary modules learn beside it."""
        own = (t for u in self.units for t in u.tensors if not (is_adapter(t.name) or is_offset(t.name)))
        return sum(t.parameters for t in own)

    @property
    def trainable_parameters(self) -> int:
        """Number of elements that training changes."""
        return sum(t.size for u in self.units for t in u.tensors if t.trainable)

    @property
    def trained_dtypes(self) -> frozenset[str]:
        """What the tensors that training changes are kept in."""
        return frozenset(t.dtype for u in self.units for t in u.tensors if t.trainable)

    @cached_property
    def adapted(self) -> frozenset[str]:
        """The plain model's parameters that training changes or adapts."""
        return frozenset(base_name(t.name) for u in self.units for t in u.tensors if t.trainable)

    @cached_property
    def has_frozen(self) -> bool:
        """Whether something of it stays as it is, and so is in no checkpoint: an adapter's base, other parts."""
        return not all(t.trainable for u in self.units for t in u.tensors)

    @cached_property
    def frozen_root(self) -> bool:
        """Whether nothing of embedding, final norm and head trains."""
        return not any(t.trainable for t in self.units[0].tensors)

    @cached_property
    def known(self) -> dict[tuple[object, ...], Any]:
        """What the plan has worked out about this model so far, by question: layers repeat, and so do plans."""
        return {}

    @cached_property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the configuration (multimodal folders nest it in `text_config`).

        `vocab_size` and `hidden_size` are those of the root's longest table, the embedding, where it lacks them: some
        folders leave them to mlx-lm's defaults (Gemma 3), some families call them otherwise (DBRX).
        """
        nested = self.config.get("text_config")
        config: Mapping[str, Any] = nested if isinstance(nested, Mapping) else self.config
        tables = [t for u in self.units[:1] for t in u.tensors if len(t.shape) == 2]
        if not tables:
            return config
        table = max(tables, key=lambda t: t.shape[0])
        columns = table.shape[1] * 32 // table.bits if table.bits else table.shape[1]
        shape = {"vocab_size": table.shape[0], **({} if "n_embd" in config else {"hidden_size": columns})}
        return {**config, **{k: v for k, v in shape.items() if config.get(k) is None}}


def is_adapter(name: str) -> bool:
    """True for the tensors that adapters add to a model."""
    return name.rpartition(".")[2] in ADAPTER_NAMES


def own_name(name: str) -> tuple[int, str]:
    """(a daughter's place, what mlx-lm calls the tensor in a model with that one alone); see `model.together`."""
    found = _OWN.search(name)
    return (int(found[1]), _OWN.sub(".", name)) if found else (0, name)


def is_offset(name: str) -> bool:
    """True for the learned offsets of the scales of ternary weights."""
    return name.rpartition(".")[2] == SCALE_OFFSETS


def base_name(name: str) -> str:
    """The plain model's parameter that a tensor is or adapts: `x.weight` for `x.linear.weight` and `x.lora_a`, which
    may be one of several daughters'."""
    stem, _, leaf = own_name(name)[1].rpartition(".")
    if is_adapter(name) or is_offset(name):
        return f"{stem}.weight"
    return f"{stem.removesuffix('.linear').removesuffix('.embedding')}.{leaf}"


def is_router(name: str) -> bool:
    """True for the weights and biases of a mixture's router: its last module is called router or gate."""
    parts = name.split(".")
    return len(parts) > 1 and parts[-2] in ROUTER_NAMES


def is_embedding(name: str) -> bool:
    """Whether a matrix of the root, or its module, is an embedding by its name, not a head."""
    return any(word in name for word in EMBEDDING_NAMES) and "embed_out" not in name
