"""From a configuration to a ModelSpec: builds mlx-lm's model lazily (no weight is ever computed) and reads its shapes.

Decides which tensors form the root and the layers, the dtype each computes in, and which folders are refused because
mlx-lm cannot build them.

A model sees the names of the tensors stored in its folder before it is described (`settle`), and a folder whose head
mlx-lm would drop is refused. No file is opened here.

What goes wrong in mlx-lm's code before training becomes one line that names the model (`foreign`); a fault of ours
keeps its traceback.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_empire.errors import EmpireError, UserError, of_gpu
from mlx_empire.model.bitnet import with_plain_linears
from mlx_empire.model.config import HEADS, TIE
from mlx_empire.model.mlx_lm_modules import OURS, classes_of, said_of
from mlx_empire.model.packing_config import BITNET_NAME, is_packed, packing_method
from mlx_empire.model.spec import ModelSpec, TensorSpec, UnitSpec, is_adapter, is_offset
from mlx_empire.model.stored_tensors import spell_tensors
from mlx_empire.recipe.text import first_line

LACKS = re.compile(r"__init__\(\) missing \d+ required positional arguments?: (.+)")


@contextlib.contextmanager
def foreign(place: str, *, mixed: bool = False) -> Iterator[None]:
    """Run mlx-lm's code; `place` begins the UserError's line: the model, and what mlx-lm's code was asked to do.

    `mixed`: our code runs inside as well, and an error whose innermost frame is ours is raised as it is; else what
    is printed is kept from the terminal, for a module that ends the program says there why.
    """
    said = io.StringIO()
    try:
        with contextlib.nullcontext() if mixed else contextlib.redirect_stdout(said):
            yield
    except EmpireError:
        raise
    except SystemExit as error:
        needed = error.__context__.name if isinstance(error.__context__, ImportError) else None
        why = f"it needs the Python module {needed}, which is not installed" if needed else None
        raise UserError(f"{place}: {why or first_line(said.getvalue()) or f'it exits ({error})'}") from None
    except Exception as error:
        if of_gpu(error):
            raise
        if mixed and _is_ours(error.__traceback__):
            raise
        raise UserError(f"{place}: {reason_of(error)}") from None


def reason_of(error: BaseException) -> str:
    """What an exception says, in one line; its kind where its text alone would not be understood."""
    kind, text = type(error).__name__, first_line(str(error))
    if not text:
        return kind
    if absent := LACKS.search(str(error)):
        return first_line(f"config.json lacks {absent[1]}")
    return text if isinstance(error, ValueError | RuntimeError) else f"{kind}: {text}"


def _is_ours(traceback: TracebackType | None) -> bool:
    """Whether the innermost frame runs our code."""
    assert traceback is not None
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return str(traceback.tb_frame.f_globals.get("__name__", "")).startswith("mlx_empire.")


Stored = Mapping[str, tuple[str, Sequence[int]]]  # a folder's tensors: name -> (dtype as MLX calls it, shape)


def sanitize(model: nn.Module, weights: dict[str, mx.array], where: Path | str) -> dict[str, mx.array]:
    """The model's own renaming of stored tensors to mlx-lm's, on lazy arrays; its failure is a UserError."""
    if not hasattr(model, "sanitize"):
        return weights
    try:
        return dict(model.sanitize(weights))
    except Exception as error:  # foreign code on foreign names: usually a KeyError for a missing tensor
        raise UserError(
            f"{where}: mlx-lm cannot map its tensors to the model ({reason_of(error)}); is it complete?"
        ) from None


def read_stored(model: nn.Module, stored: Mapping[str, mx.array], where: Path | str) -> dict[str, mx.array]:
    """A folder's tensors by mlx-lm's names: what transformers writes otherwise is spelled for it (`stored_tensors`)."""
    return sanitize(model, spell_tensors(model, stored), where)


def stand_ins(stored: Stored) -> dict[str, mx.array]:
    """Lazy zeros with the names, shapes and dtypes of tensors."""
    return {name: mx.zeros(tuple(shape), getattr(mx, dtype)) for name, (dtype, shape) in stored.items()}


def settle(model: nn.Module, stored: Stored, where: Path | str) -> dict[str, mx.array]:
    """Let the model that will be described and trained see a folder's tensors; returns stand-ins by mlx-lm's names.

    A few families (gemma3) tie their head only when `sanitize` finds none among the weights, and can do so
    once: the sources and the writer take the plain `build`. Works on names and shapes alone and on lazy zeros,
    so it costs nothing and opens no file.
    """
    return read_stored(model, stand_ins(stored), where)


def refuse_dropped_head(spec: ModelSpec, stored: Stored, where: Path | str) -> None:
    """UserError where the folder has a head of its own, says that it is one, and mlx-lm's model has none for it."""
    head = next((name for name in stored if name.endswith(HEADS)), None)
    vocabulary = spec.text_config.get("vocab_size")
    matrices = [t for t in spec.units[0].tensors if len(t.shape) == 2 and t.shape[0] == vocabulary]
    if head is not None and spec.text_config.get(TIE) is False and len(matrices) == 1:
        raise UserError(
            f"{where}: {head} is stored and {TIE} is false, but {said_of(spec.family)} has no head of its own; "
            f"it would be dropped (if it only repeats the embedding, write {TIE}: true into config.json)"
        )


LAYER_LIST_NAMES = ("layers", "h", "blocks")
COMPUTE_DTYPES = ("bfloat16", "float32")  # that are taken as stored


def build_model(config: Mapping[str, Any], name: str) -> nn.Module:
    """Build mlx-lm's model from its configuration; its arrays are lazy and hold no memory until evaluated."""
    if "model_file" in config:
        raise UserError(
            f"{name}: config.json asks to run model_file={config['model_file']!r}; code is never run"
        )
    if is_packed(config):
        raise UserError(
            f"{name}: its weights are quantised ({packing_method(config)}); full fine-tuning needs a bfloat16 or "
            "float32 folder, the one it was made from or mlx_lm.convert -d's; adapters do not (tuning.type: lora)"
        )
    kind = config.get("model_type")
    who = "mlx_empire" if kind in OURS else "mlx-lm"
    with foreign(f"{name}: {who} cannot build model_type {kind!r}"):
        model_class, args_class = classes_of(config)
        given = copy.deepcopy(dict(config))  # some write into it
        model: nn.Module = model_class(args_class.from_dict(given))
        if config.get("model_type") == BITNET_NAME:
            model = with_plain_linears(model)
        model.train().trainable_parameters()  # a few classes are no whole modules, which shows only here
    return model


def default_numbers(config: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers that mlx-lm assumes where a configuration is silent; none for a kind that it does not have."""
    try:
        with foreign("its default numbers"):
            _, args_class = classes_of(config)
            return numbers_of(dataclasses.fields(args_class))
    except UserError:  # whoever builds the model will say it
        return {}


def numbers_of(fields: Iterable[dataclasses.Field[Any]]) -> dict[str, int | float]:
    """The default of each field that has a number for one."""
    defaults = {f.name: f.default for f in fields}
    return {k: v for k, v in defaults.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def find_layers(model: nn.Module, name: str) -> tuple[nn.Module, str, str]:
    """The module that owns the list of layers, the list's key there, and its full path (`model.layers`)."""
    try:
        target = list(model.layers)
    except Exception:  # a property of a foreign class: whatever it raises, there is no list
        target = []
    if target:
        for path, module in model.named_modules():
            for key in LAYER_LIST_NAMES:
                found = module.get(key)
                if isinstance(found, list) and len(found) == len(target) and found[0] is target[0]:
                    return module, key, f"{path}.{key}" if path else key
    raise UserError(f"{name}: no list of decoder layers found; this architecture cannot be streamed")


def compute_dtype(config: Mapping[str, Any], wanted: str | None) -> str:
    """The model's compute dtype: as asked, else as stored; float16 becomes float32, which holds all its values."""
    if wanted is not None:
        return wanted
    text = config.get("text_config")
    sources = [config, text] if isinstance(text, Mapping) else [config]
    stored = [s[key] for s in sources for key in ("torch_dtype", "dtype") if isinstance(s.get(key), str)]
    return stored[0] if stored and stored[0] in COMPUTE_DTYPES else "float32"


def describe(model: nn.Module, config: Mapping[str, Any], name: str, dtype: str) -> ModelSpec:
    """List the model's tensors by unit. Adapters, offsets of ternary scales and what mlx-lm asks to
    keep so (its `cast_predicate`) are fp32.

    Packed weights, which are no floating-point numbers, keep their dtype; only frozen ones may be there.
    """
    _, _, prefix = find_layers(model, name)
    count = len(model.layers)
    with foreign(f"{name}: mlx-lm does not say which tensors keep float32"):
        may_cast = getattr(model, "cast_predicate", None) or (lambda _: True)
        kept = {path for path, _ in tree_flatten(model.parameters()) if not may_cast(path)}
    trainable = {path for path, _ in tree_flatten(model.trainable_parameters())}
    modules = dict(model.named_modules())
    groups: list[list[TensorSpec]] = [[] for _ in range(count + 1)]
    for path, array in tree_flatten(model.parameters()):
        packed = not mx.issubdtype(array.dtype, mx.floating)
        if packed and path in trainable:
            raise UserError(f"{name}: {path} is {array.dtype}; only floating-point weights can be trained")
        rest = path.removeprefix(prefix + ".") if path.startswith(prefix + ".") else ""
        unit = int(rest.split(".", 1)[0]) + 1 if rest else 0
        exact = path in kept or is_adapter(path) or is_offset(path) or path.endswith(".global_scale")
        computes = "float32" if exact else dtype
        if packed:
            computes = str(array.dtype).removeprefix("mlx.core.")
        bits, group = _packing(modules.get(path.rpartition(".")[0]), path)
        groups[unit].append(TensorSpec(path, tuple(array.shape), computes, path in trainable, bits, group))
    names = ["root", *(f"{prefix}.{i}" for i in range(count))]
    units = tuple(UnitSpec(n, tuple(g)) for n, g in zip(names, groups, strict=True))
    return ModelSpec(name, str(config["model_type"]), dtype, units, dict(config), module=model)


def _packing(module: nn.Module | None, path: str) -> tuple[int, int]:
    """(bits of a code, inputs of a group) of a quantised module's tensor, as TensorSpec has them."""
    if module is None or "scales" not in module:
        return 0, 0
    leaf = path.rpartition(".")[2]
    return (module.bits if leaf == "weight" else 0), (
        module.group_size if leaf in ("scales", "biases", "global_scale") else 0
    )
