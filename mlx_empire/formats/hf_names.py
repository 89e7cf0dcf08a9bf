"""What an exported tensor is called and how it is laid out: the inverse of mlx-lm's renaming, checked.

mlx-lm keeps most families' names; `hf_pieces` undoes three of its changes.

A language model that mlx-lm wraps (`language_model.model.layers`) takes the names that the source folder has for it, so
that the towers beside it can be carried along: vision-language folders come in three spellings (NAMINGS).

Whether that is right is not taken from a list of families: `choose_layout` hands the names, shapes and small
tensors to the model's own `sanitize` and demands them back unchanged; for the values of large tensors the model
scaled down stands in. Where that fails, mlx-lm's own layout is exported; where that fails too (baichuan_m1
normalises its head whenever it is read), the model is refused before it is trained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_empire.errors import UserError
from mlx_empire.formats.hf_folder import Build, ModelFolder
from mlx_empire.formats.hf_pieces import HfPiece, Units, Way, as_hugging_face, as_mlx_lm
from mlx_empire.formats.safetensors import DTYPES
from mlx_empire.model.build import build_model, describe, sanitize, stand_ins
from mlx_empire.model.config import reader_of
from mlx_empire.model.packing_config import BITNET_NAME
from mlx_empire.model.scaled_down import scaled_down_config
from mlx_empire.model.spec import ModelSpec, TensorSpec

PROOF_ELEMENTS = 1 << 16  # tensors up to this size are compared by value in the proof
CHANGED = "comes back with other values"
HUGGING_FACE, MLX_LM = "huggingface", "mlx-lm"

# Families whose Hugging Face names and shapes mlx-lm keeps, as opened by transformers (tests/interop).
KEPT = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi3",
        "olmo2",
        "cohere2",
        "starcoder2",
        "falcon",
        "olmo",
    }
)

# Towers beside the language model that mlx-lm drops; they are carried into the export unchanged.
TOWERS = (
    "vision_model.",
    "vision_tower.",
    "visual.",
    "multi_modal_projector.",
    "mm_projector.",
    "patch_merge_mlp.",
    "embed_vision.",
    "vision_embedder.",
    "audio_tower.",
    "audio_model.",
    "embed_audio.",
)

# What a folder may call the parts of a language model that mlx-lm wraps: as mlx-lm, as transformers 5, as Qwen2-VL.
Naming = tuple[tuple[str, str], ...]
AS_MLX_LM: Naming = ()
AS_TRANSFORMERS: Naming = (("language_model.model.", "model.language_model."), ("language_model.", ""))
NAMINGS: tuple[Naming, ...] = (AS_MLX_LM, AS_TRANSFORMERS, (("language_model.", ""),))


@dataclass(frozen=True)
class Layout:
    """The pieces of every unit in file order; `kind`: `huggingface` or `mlx-lm`; `notes` for the user."""

    kind: str
    units: Units
    carried: tuple[str, ...]
    notes: tuple[str, ...]


def choose_layout(spec: ModelSpec, build: Build, folder: ModelFolder | None) -> Layout:
    """The Hugging Face layout where mlx-lm provably reads it back, else mlx-lm's own.

    `folder`: where the weights came from, if anywhere; its towers are carried. Cheap (names, shapes, small
    tensors): a run can ask before it trains whether its result can be exported. UserError if mlx-lm reads
    neither layout back.
    """
    if spec.family == BITNET_NAME:
        raise UserError(
            f"{spec.name}: a trained one cannot be exported, for mlx-lm's {BITNET_NAME} reads packed ternary weights "
            "only; choose another model or tuning.type: lora"
        )
    towers = _towers_to_carry(spec, folder) if folder else ()
    naming = _naming_of(spec, folder)
    why: str | None = None
    for carried in dict.fromkeys((towers, ())):
        others = {n: info for n, info in folder.stored().items() if n in carried} if folder else {}
        for way in dict.fromkeys((_named(as_hugging_face, naming), as_hugging_face, as_mlx_lm)):
            units = _laid_out(spec, way)
            theirs = way is not as_mlx_lm and _is_huggingface(spec, units, folder)
            if way not in (as_hugging_face, as_mlx_lm) and not theirs:
                continue  # another's names with mlx-lm's layout would help nobody
            why = naming_problem(spec, build, units, stand_ins(others)) or _problem_when_small(spec, way)
            if why is None:
                kind = HUGGING_FACE if theirs else MLX_LM
                return Layout(kind, units, carried, tuple(_notes(spec, kind, units, carried, folder)))
    raise UserError(
        f"{spec.name}: a trained one cannot be exported, for mlx-lm does not read its own {spec.family} tensors "
        f"back: {why}; choose another model" + (" or tuning.type: lora" if str(why).endswith(CHANGED) else "")
    )


def naming_problem(
    spec: ModelSpec, build: Build, units: Units, others: dict[str, mx.array] | None = None
) -> str | None:
    """Why the model's `sanitize` does not turn the pieces back into exactly the spec's tensors; None where it does.

    Names and shapes of all tensors are compared, values of those up to `PROOF_ELEMENTS` elements; everything
    stays lazy but those. `others`: carried tensors that lie beside the pieces.
    """
    tensors = {t.name: t for unit in spec.units for t in unit.tensors}
    before = {t.name: _sample(t) for t in tensors.values()}
    exported = dict(others or {})
    for piece in (p for unit in units for p in unit):
        made = piece.make(*(before[name] for name in piece.takes))
        if tuple(made.shape) != piece.shape or piece.name in exported:
            return f"{piece.name} stands there twice, or in another shape"
        exported[piece.name] = made
    model = build()
    try:
        after = sanitize(model, exported, spec.name)
    except UserError as error:
        return str(error).removeprefix(f"{spec.name}: ")
    expected = before.keys() | {name for name, _ in tree_flatten(model.parameters())}
    if after.keys() != before.keys() or expected != before.keys():
        wrong = min((after.keys() ^ before.keys()) | (expected - before.keys()))
        return f"{wrong} is {'missing' if wrong in expected else 'no part of its model'}"
    changed = (n for n, t in tensors.items() if not _same_again(t, before[n], after[n]))
    name = next(changed, None)
    return None if name is None else f"{name} {CHANGED}"


def _same_again(tensor: TensorSpec, before: mx.array, after: mx.array) -> bool:
    if tensor.size > PROOF_ELEMENTS:
        return after.shape == before.shape
    return bool(mx.array_equal(after, before).item())


def _problem_when_small(spec: ModelSpec, way: Way) -> str | None:
    """As `naming_problem`, with the values of what is too large to be compared in the model itself: of a small one."""
    if all(t.size <= PROOF_ELEMENTS for unit in spec.units for t in unit.tensors):
        return None
    config = scaled_down_config(spec.config)
    build = partial(build_model, config, spec.name)
    try:
        small = describe(build(), config, spec.name, spec.dtype)
    except UserError:
        return None  # whether it can be scaled down at all is `engine.streamable`'s question
    return naming_problem(small, build, _laid_out(small, way))


def huggingface_names(spec: ModelSpec, folder: ModelFolder | None, adapted: Collection[str]) -> bool:
    """Whether modules of `spec` are called as Hugging Face calls them, renamed, stacked and wrapping ones apart.

    `adapted`: the matrices that matter, where the folder itself has them under Hugging Face's names.
    """
    reader, naming = reader_of(spec.config), _naming_of(spec, folder)
    if _is_wrapped(spec) and reader is not None and reader[0] in KEPT:
        return True
    if folder and not _is_by_mlx(folder) and all(renamed(name, naming) in folder.tensors for name in adapted):
        return True
    return _is_huggingface(spec, _laid_out(spec, as_hugging_face), folder)


def tower_names(folder: ModelFolder) -> tuple[str, ...]:
    """Names of a folder's tensors that belong to a tower beside the language model, in the folder's order."""
    return tuple(n for n in folder.tensors if n.removeprefix("model.").startswith(TOWERS))


def _towers_to_carry(spec: ModelSpec, folder: ModelFolder) -> tuple[str, ...]:
    """Towers that mlx-lm's model does not have itself; none where they are packed: the result's config says plain."""
    own = {t.name for unit in spec.units for t in unit.tensors}
    names = tuple(name for name in tower_names(folder) if name not in own)
    return () if _any_packed(folder, names) else names


def _any_packed(folder: ModelFolder, names: Iterable[str]) -> bool:
    return any(folder.tensors[name].code not in DTYPES for name in names)


def _is_wrapped(spec: ModelSpec) -> bool:
    return all(unit.name.startswith("language_model.") for unit in spec.units[1:])


def _naming_of(spec: ModelSpec, folder: ModelFolder | None) -> Naming:
    """The naming under which most of the model's tensors stand in the folder."""
    if folder is None or not _is_wrapped(spec):
        return AS_MLX_LM
    own = [t.name for unit in spec.units for t in unit.tensors]
    return max(NAMINGS, key=lambda naming: sum(renamed(name, naming) in folder.tensors for name in own))


def renamed(name: str, naming: Naming) -> str:
    """A name of mlx-lm's, of a tensor or a module, under another naming."""
    before, after = next(((b, a) for b, a in naming if name.startswith(b)), ("", ""))
    return after + name.removeprefix(before)


def _named(way: Way, naming: Naming) -> Way:
    """A layout under another naming."""
    if naming == AS_MLX_LM:
        return way

    def named(tensors: tuple[TensorSpec, ...]) -> Iterator[HfPiece]:
        return (replace(piece, name=renamed(piece.name, naming)) for piece in way(tensors))

    return named


def _laid_out(spec: ModelSpec, way: Way) -> Units:
    return tuple(tuple(way(unit.tensors)) for unit in spec.units)


def _sample(tensor: TensorSpec) -> mx.array:
    if tensor.size > PROOF_ELEMENTS:
        return mx.zeros(tensor.shape)
    return (mx.arange(tensor.size) % 251).astype(mx.float32).reshape(tensor.shape)


def _is_huggingface(spec: ModelSpec, units: Units, folder: ModelFolder | None) -> bool:
    pieces = [p for unit in units for p in unit]
    another = _is_wrapped(spec) and not any(p.name == p.takes[0] for p in pieces)
    if spec.family in KEPT or (not another and any(p.takes != (p.name,) for p in pieces)):
        return True  # what was undone, mlx-lm's sanitize does for Hugging Face names only
    if folder is None or _is_by_mlx(folder):
        return False
    return all(p.name in folder.tensors and folder.tensors[p.name].shape == p.shape for p in pieces)


def _is_by_mlx(folder: ModelFolder) -> bool:
    return any(header.metadata.get("format") == "mlx" for header in folder.files.values())


def _notes(
    spec: ModelSpec,
    kind: str,
    units: Units,
    carried: tuple[str, ...],
    folder: ModelFolder | None,
) -> Iterator[str]:
    if kind == MLX_LM:
        yield f"exported in mlx-lm's own layout of {spec.family}: mlx_lm.load opens it, transformers may not"
    if carried:
        yield f"{len(carried)} tensors beside the language model were carried through unchanged; not trained"
    written = {p.name for unit in units for p in unit} | {t.name for unit in spec.units for t in unit.tensors}
    if folder and not carried and set(tower_names(folder)) - written:
        packed = _any_packed(folder, tower_names(folder))
        why = "are packed" if packed else "cannot be read by mlx-lm beside this export"
        yield f"the towers of {folder.path} {why}: they are left out"
    if folder and kind == HUGGING_FACE and not _any_packed(folder, folder.tensors):
        dropped = sorted(folder.tensors.keys() - written - set(carried))
        if dropped:
            yield f"{len(dropped)} tensors of {folder.path} are left out, as mlx-lm drops them: {dropped[0]}"
