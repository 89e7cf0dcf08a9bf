"""The tensors of a unit under other names and in other shapes: the inverse of what mlx-lm does when it reads a folder.

Three of mlx-lm's changes are undone, recognised by the tensors' names:

| mlx-lm                                             | Hugging Face                                          |
|----------------------------------------------------|-------------------------------------------------------|
| X.switch_mlp.gate_proj.weight [E, out, in], ...    | X.experts.<e>.gate_proj.weight [out, in], ...         |
| ... under block_sparse_moe (mixtral)               | X.experts.<e>.w1 (gate), .w2 (down), .w3 (up)         |
| feed_forward.experts.gate_proj/up_proj.weight      | ...experts.gate_up_proj [E, in, 2 out] (llama4)       |
| feed_forward.experts.down_proj.weight [E, out, in] | ...experts.down_proj [E, in, out] (llama4)            |
| self_attn.embed_q, unembed_out (deepseek_v3)       | self_attn.kv_b_proj.weight [heads (nope + v), rank]   |

Nothing is decided here: `hf_names` proves which way is right for a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter

import mlx.core as mx

from mlx_empire.model.spec import TensorSpec

MIXTRAL_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


@dataclass(frozen=True)
class HfPiece:
    """One exported tensor: `make` builds it from the mlx-lm tensors named in `takes`, in that order."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    takes: tuple[str, ...]
    make: Callable[..., mx.array]


Units = tuple[tuple[HfPiece, ...], ...]
Way = Callable[[tuple[TensorSpec, ...]], Iterator[HfPiece]]  # lays out the tensors of a unit


def as_mlx_lm(tensors: tuple[TensorSpec, ...]) -> Iterator[HfPiece]:
    """mlx-lm's own names and shapes."""
    return map(_same, tensors)


def as_hugging_face(tensors: tuple[TensorSpec, ...]) -> Iterator[HfPiece]:
    """Hugging Face's, as the table above says; what it does not name stays."""
    here = {t.name: t for t in tensors}
    for tensor in tensors:
        stem, _, last = tensor.name.removesuffix(".weight").rpartition(".")
        if stem.endswith(".feed_forward.experts") and last in ("gate_proj", "up_proj", "down_proj"):
            if last == "down_proj":
                yield _swapped(tensor, f"{stem}.down_proj")
            elif last == "gate_proj":
                yield _gate_and_up(tensor, here[f"{stem}.up_proj.weight"], f"{stem}.gate_up_proj")
        elif stem.endswith(".switch_mlp") and len(tensor.shape) == 3:
            yield from _experts(tensor, stem.removesuffix(".switch_mlp"), last)
        elif last == "embed_q" and f"{stem}.unembed_out.weight" in here:
            yield _key_value_up(tensor, here[f"{stem}.unembed_out.weight"], f"{stem}.kv_b_proj.weight")
        elif not (last == "unembed_out" and f"{stem}.embed_q.weight" in here):
            yield _same(tensor)


def _same(tensor: TensorSpec) -> HfPiece:
    return HfPiece(tensor.name, tensor.shape, tensor.dtype, (tensor.name,), lambda x: x)


def _swapped(tensor: TensorSpec, name: str) -> HfPiece:
    experts, rows, columns = tensor.shape
    shape = (experts, columns, rows)
    return HfPiece(name, shape, tensor.dtype, (tensor.name,), lambda x: mx.swapaxes(x, 1, 2))


def _gate_and_up(gate: TensorSpec, up: TensorSpec, name: str) -> HfPiece:
    experts, rows, columns = gate.shape

    def make(g: mx.array, u: mx.array) -> mx.array:
        return mx.concatenate([mx.swapaxes(g, 1, 2), mx.swapaxes(u, 1, 2)], axis=-1)

    return HfPiece(name, (experts, columns, 2 * rows), gate.dtype, (gate.name, up.name), make)


def _experts(tensor: TensorSpec, owner: str, projection: str) -> Iterator[HfPiece]:
    if owner.endswith(".block_sparse_moe"):
        projection = MIXTRAL_NAMES.get(projection, projection)
    suffix = tensor.name.rpartition(".")[2]
    for e in range(tensor.shape[0]):
        name = f"{owner}.experts.{e}.{projection}.{suffix}"
        yield HfPiece(name, tensor.shape[1:], tensor.dtype, (tensor.name,), itemgetter(e))


def _key_value_up(key: TensorSpec, value: TensorSpec, name: str) -> HfPiece:
    heads, rank, nope = key.shape
    rows = heads * (nope + value.shape[1])

    def make(k: mx.array, v: mx.array) -> mx.array:
        return mx.concatenate([mx.swapaxes(k, 1, 2), v], axis=1).reshape(rows, rank)

    return HfPiece(name, (rows, rank), key.dtype, (key.name, value.name), make)
