"""Where a model's first weights come from: a Hugging Face folder or a random initialisation, with or without adapters.

Decides the order and the dtype in which tensors arrive and that no more than about one unit is ever held:
tensors stay lazy until their turn, and every reference is dropped as soon as the consumer has the array. Both
sources build their graph of lazy arrays once and consume it; reading a unit again builds it again.

With adapters the base's tensors are renamed and perhaps packed, and fresh adapters join them. mlx-lm's adapter layers
nest the base (`q_proj.linear.weight`), so names change while loading; one tensor of the base is held at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_empire.errors import UserError, of_gpu
from mlx_empire.formats.hf_folder import Build, ModelFolder, open_folder
from mlx_empire.formats.safetensors import TensorInfo, open_plain
from mlx_empire.model.build import read_stored
from mlx_empire.model.config import EMBEDDINGS, HEADS, TIE
from mlx_empire.model.lora import as_first_values, initial_adapter, magnitude
from mlx_empire.model.mlx_lm_modules import said_of
from mlx_empire.model.quantize import PACKED_PARTS, Choice, quantize, unpacked_matrix
from mlx_empire.model.spec import ModelSpec, TensorSpec, is_offset, own_name

READABLE = (mx.float32, mx.bfloat16, mx.float16)
NO_WEIGHTS = (
    "rotary_emb.inv_freq",
    ".masked_bias",
    ".attn.bias",
    ".attention.bias",
    ".position_ids",
)  # constants of older folders
SAMPLE_BYTES = 64 << 10  # at each end of a tensor: these alone are compared
PACKED = ("uint32", "uint8")  # codes, and the scales of MLX's floating-point formats


class WeightSource(Protocol):
    """Gives the tensors of a model unit by unit."""

    def unit(self, index: int) -> Iterator[tuple[TensorSpec, mx.array]]:
        """Every tensor of `spec.units[index]` in the spec's order, evaluated, contiguous, in `stored_dtype`.

        At most about one unit (at its size in the source) is held beyond what the consumer keeps; the
        consumer should drop each array before it asks for the next. Use one source from one thread only: lazy
        arrays belong to the thread that made them.
        """
        ...


def stored_dtype(tensor: TensorSpec) -> str:
    """The dtype a rank keeps a tensor in: float32 for small tensors, else the one it computes in."""
    return "float32" if tensor.kind == "small" else tensor.dtype


class _LazySource:
    """Lazy arrays that are consumed unit by unit, and opened again when a unit is asked for twice."""

    def __init__(self, where: str, spec: ModelSpec) -> None:
        self._where = where
        self._spec = spec
        self._weights = self._fill()

    def _open(self) -> dict[str, mx.array]:
        raise NotImplementedError

    def _fill(self) -> dict[str, mx.array]:
        weights = self._open()
        wanted = {t.name: t for unit in self._spec.units for t in unit.tensors}
        unread = sorted(weights.keys() - wanted.keys())
        for tensor in wanted.values():
            self._check(tensor, weights.get(tensor.name), unread)
        for name in unread:
            self._refuse_unused(name)
        return {name: weights[name] for name in wanted}

    def _check(self, tensor: TensorSpec, found: mx.array | None, unread: Sequence[str]) -> None:
        place = f"{self._where}: tensor {tensor.name}"
        if found is None:
            why = "is this the model's own folder?"
            if unread:
                family = self._spec.family
                why = f"it has {unread[0]}, which {said_of(family)} does not read; use a folder that it opens"
            raise UserError(f"{place} is missing, expected shape {tensor.shape}; {why}")
        if tuple(found.shape) != tensor.shape:
            raise UserError(
                f"{place} has shape {tuple(found.shape)}, expected {tensor.shape} from config.json"
            )
        if found.dtype not in READABLE and not (
            tensor.dtype in PACKED and found.dtype == getattr(mx, tensor.dtype)
        ):
            kind = str(found.dtype).removeprefix("mlx.core.")
            raise UserError(
                f"{place} is {kind}, expected float32, bfloat16 or float16; quantised weights cannot train"
            )

    def _refuse_unused(self, name: str) -> None:
        repeated = name.endswith(HEADS) and self._spec.text_config.get(TIE) is not False
        if repeated or name.endswith(NO_WEIGHTS):
            return
        raise UserError(
            f"{self._where}: tensor {name} has no place in {said_of(self._spec.family)}, which would compute another "
            "model without it; use a folder of another family"
        )

    def unit(self, index: int) -> Iterator[tuple[TensorSpec, mx.array]]:
        """See `WeightSource.unit`."""
        tensors = self._spec.units[index].tensors
        if any(t.name not in self._weights for t in tensors):
            self._weights = self._fill()
        mine = {t.name: self._weights.pop(t.name) for t in tensors}
        for tensor in tensors:
            yield (
                tensor,
                self._evaluate(mine.pop(tensor.name), tensor),
            )  # no local name: it would pin the array
        mx.clear_cache()

    def _evaluate(self, array: mx.array, tensor: TensorSpec) -> mx.array:
        # `contiguous` copies a slice out of its buffer (llama4's fused gate and up), which would stay pinned.
        # On the CPU's stream: a GPU that waits inside one evaluation for a slow disk is taken for hung.
        with mx.stream(mx.cpu):
            array = mx.contiguous(array.astype(getattr(mx, stored_dtype(tensor))))
        try:
            mx.eval(array)
        except (RuntimeError, ValueError, OSError) as error:
            if of_gpu(error):
                raise
            raise UserError(
                f"{self._where}: tensor {tensor.name} cannot be read: {str(error)[:160]}"
            ) from None
        return array


class FolderSource(_LazySource):
    """Weights of a local Hugging Face or mlx-lm folder (float32, bfloat16 or float16 safetensors).

    `build` makes mlx-lm's model lazily; its own `sanitize` renames the folder's tensors. Every tensor of the
    spec must be there in the right shape, and of what `sanitize` leaves (it drops vision towers) the model must have
    all: UserError naming folder and tensor.
    """

    def __init__(self, folder: Path, build: Build, spec: ModelSpec) -> None:
        self._folder = open_folder(folder)
        self._build = build
        has_head = any(t.name.endswith(HEADS) for t in spec.units[0].tensors)
        if spec.text_config.get(TIE) is True and not has_head:
            _refuse_other_head(self._folder)
        super().__init__(str(folder), spec)

    def _open(self) -> dict[str, mx.array]:
        model = self._build()
        with mx.stream(mx.cpu):
            return read_stored(model, self._folder.load(), self._where)


def _refuse_other_head(folder: ModelFolder) -> None:
    """UserError where the head that the model leaves out, tied to its embedding, is stored and seen to be another
    matrix: of another shape, or with other bytes at its ends. Of heads in another dtype the shape alone is compared.
    """
    heads = [info for name, info in folder.tensors.items() if name.endswith(HEADS)]
    embeddings = [info for name, info in folder.tensors.items() if name.endswith(EMBEDDINGS)]
    if len(heads) != 1 or len(embeddings) != 1:
        return
    head, embedding = heads[0], embeddings[0]
    other = head.shape != embedding.shape
    if other or (head.code == embedding.code and _sample(head) != _sample(embedding)):
        raise UserError(
            f"{folder.path}: {head.name} differs from {embedding.name}, and config.json ties them ({TIE}: true), so "
            f"tools disagree on which is the head; write {TIE}: false to use {head.name}, or remove it from the folder"
        )


def _sample(info: TensorInfo) -> tuple[bytes, bytes]:
    """A tensor's first and last bytes."""
    with open_plain(info.file) as file:
        ends = []
        for place in (info.start, max(info.start, info.stop - SAMPLE_BYTES)):
            file.seek(place)
            ends.append(file.read(min(SAMPLE_BYTES, info.stop - info.start)))
    return ends[0], ends[1]


class RandomSource(_LazySource):
    """A fresh initialisation by mlx-lm's own constructors: a function of model, seed and kind of device.

    The global generator is seeded and `build` called, which gives every tensor its place in one sequence of
    random keys; so values depend neither on the order of reading nor on the number of ranks. Leaves the
    generator seeded.
    """

    def __init__(self, build: Build, spec: ModelSpec, seed: int) -> None:
        self._build = build
        self._seed = seed
        super().__init__(spec.name, spec)

    def _open(self) -> dict[str, mx.array]:
        mx.random.seed(self._seed)
        return dict(tree_flatten(self._build().parameters()))


class TunedSource:
    """A `WeightSource` of `spec` (base and adapters, or offsets of ternary scales) over `base`, a source of the model
    without them.

    `packing`: how matrices of the base are packed while they are loaded, if any are. `start`: the adapters' first
    values by name, of an earlier run; without it they are fresh ones.
    """

    def __init__(
        self,
        base: WeightSource,
        spec: ModelSpec,
        seed: int,
        packing: Choice | None,
        start: Mapping[str, mx.array] | None = None,
    ) -> None:
        self._base, self._spec, self._seed, self._packing, self._start = base, spec, seed, packing, start
        # By module the parts of a matrix that is stored packed, until its rows' norms are known.
        self._stored: dict[str, dict[str, mx.array]] = {}

    def unit(self, index: int) -> Iterator[tuple[TensorSpec, mx.array]]:
        """See `WeightSource.unit`."""
        wanted = {t.name: t for t in self._spec.units[index].tensors}
        base = self._base.unit(index)
        made: dict[str, mx.array] = {}
        for name, tensor in wanted.items():
            if name.endswith((".lora_a", ".lora_b")) or is_offset(name):
                yield tensor, self._first(tensor)
                continue
            while name not in made:
                made |= self._made(*next(base), wanted, root=index == 0)
            yield tensor, made.pop(name)
        assert next(base, None) is None, f"unit {index}: the base has tensors that the tuned model lacks"

    def _first(self, tensor: TensorSpec) -> mx.array:
        """What is trained beside the base, before the first step, in float32."""
        if is_offset(tensor.name):
            return mx.zeros(tensor.shape)
        if self._start is None:
            return initial_adapter(tensor, self._seed)
        return as_first_values(self._start[tensor.name])

    def _made(
        self, tensor: TensorSpec, array: mx.array, wanted: dict[str, TensorSpec], *, root: bool
    ) -> dict[str, mx.array]:
        """What becomes of one tensor of the base, by its names in the tuned model."""
        stem, _, leaf = tensor.name.rpartition(".")
        places = (f"{stem}.linear", f"{stem}.embedding", stem) if stem else ("",)
        name = next(n for n in (f"{p}.{leaf}" if p else leaf for p in places) if n in wanted)
        if wanted[name].bits and not tensor.bits:
            packing = self._packing(tensor, root) if self._packing else None
            assert packing is not None, f"{name} is packed while loading: by what?"
            inside = name.removesuffix(".weight")
            names = (name, f"{inside}.scales", f"{inside}.biases")
            return dict(zip(names, quantize(array, packing), strict=False))
        made = {name: array}
        magnitudes = [n for n in wanted if own_name(n)[1] == f"{stem}.m"]  # of each daughter
        if magnitudes and (m := self._magnitude(stem, leaf, array, wanted)) is not None:
            mx.eval(m)
            made |= dict.fromkeys(magnitudes, m)
        return made

    def _magnitude(
        self, stem: str, leaf: str, array: mx.array, wanted: Mapping[str, TensorSpec]
    ) -> mx.array | None:
        """DoRA's first `m` of a module once what it needs is there, of which `array` is the last; None before."""
        if self._start is not None:
            return as_first_values(self._start[f"{stem}.m"]) if leaf == "weight" else None
        if f"{stem}.linear.scales" not in wanted or leaf not in PACKED_PARTS:
            return magnitude(array) if leaf == "weight" else None
        parts = self._stored.setdefault(stem, {})
        parts[leaf] = array
        if any(f"{stem}.linear.{name}" in wanted and name not in parts for name in PACKED_PARTS):
            return None
        del self._stored[stem]
        bits, group = wanted[f"{stem}.linear.weight"].bits, wanted[f"{stem}.linear.scales"].group
        with mx.stream(mx.cpu):
            return magnitude(unpacked_matrix(parts, bits, group))
