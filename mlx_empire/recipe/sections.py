"""The sections of a recipe on what is trained, and how: their keys, types, ranges and defaults.

Every field has a title, which is the one sentence on what the key decides, and a description of what it accepts, which
completes the sentence "expected ...". Messages and docs/keys.md are made from them.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from mlx_empire.errors import UserError
from mlx_empire.recipe.duration import Duration
from mlx_empire.recipe.fields import (
    LENGTHS,
    AnyLength,
    Bits,
    Count,
    ModelSource,
    RecipePath,
    Section,
    Share,
    as_tuple,
    exact_number,
    true_or_false,
)
from mlx_empire.recipe.mixture import MOST_SOURCES, SOURCES, DataSource, paths_of

QAT_WARMUP = Duration(10, "percent")  # where tuning.qat_warmup is null


class ModelSection(Section):
    path: RecipePath = Field(
        title="The folder that training begins with: configuration, weights and tokenizer.",
        description="the path of a local Hugging Face folder",
    )
    source: ModelSource | None = Field(
        title="Where `fetch` brings that folder from; the model card of a result names it.",
        default=None,
        description="owner/name@revision of a model on the Hugging Face Hub (a branch, a tag or a commit), or null",
    )
    architecture: str | None = Field(
        title="What kind of model to plan for, and to begin at random, where that folder is not there.",
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="a catalog name such as llama-4-scout-109b, for planning when the folder is not there",
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        title="In which numbers layers compute and weights and gradients travel.",
        default=None,
        description="bfloat16, float16 (with losses scaled, see numerics.loss_scale) or float32 (compute and wire), or "
        "null (as stored in the folder, float16 as float32)",
    )
    init: Literal["pretrained", "random"] = Field(
        title="Where the first weights come from.",
        default="pretrained",
        description="pretrained or random (built from config.json alone)",
    )
    compare: Literal["headers", "contents"] = Field(
        title="How thoroughly machines that each have the folder compare it before the first step.",
        default="headers",
        description="headers or contents (what of the folder must be equal on all machines that have it; contents "
        "reads every weight once more)",
    )
    base_digest: str | None = Field(
        title="The frozen folder that this must be, so that an adapter is never trained on another base.",
        default=None,
        pattern=r"^sha256:[0-9a-f]{64}$",
        description="the digest of a frozen folder (sha256:...), as its FROZEN.json says, or null (any folder)",
    )


PARTS = ("layers", "unfrozen_parameters")  # what type full knows of the keys of tuning


class TuningSection(Section):
    type: Literal["full", "lora", "dora", "qlora"] = Field(
        title="What is trained: every weight, or adapters beside frozen ones.",
        default="full",
        description="full, lora, dora or qlora",
    )
    rank: Count | None = Field(
        title="How wide adapters are: more learns more, and takes more memory.",
        default=None,
        description="a whole number of at least 1 (the adapters' rank), or null (8)",
    )
    alpha: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        title="How strongly adapters act, before division by their rank.",
        default=None,
        description="a number above 0 (adapters are scaled by alpha / rank), or null (2 x rank)",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        title="Which part of an adapter's input is left out at random in training.",
        default=None,
        description="a number from 0 to below 1 (of an adapter's input), or null (0)",
    )
    targets: Annotated[
        Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1, max_length=64)] | None,
        BeforeValidator(as_tuple),
    ] = Field(
        title="Which modules get adapters; null and all-linear are the layers' linear ones but routers and experts.",
        default=None,
        description="all-linear, a list of module names such as [q_proj, v_proj, experts, lm_head], or null",
    )
    layers: Count | None = Field(
        title="How many of the last layers get adapters; with type full, how many train, and nothing else.",
        default=None,
        description="a whole number (adapters in the last so many layers; full: only these train), or null (all)",
    )
    unfrozen_parameters: Annotated[
        Annotated[tuple[str, ...], Field(min_length=1, max_length=64)] | None, BeforeValidator(as_tuple)
    ] = Field(
        title="Which weights full tuning trains by their names, beside the last layers; all else is frozen.",
        default=None,
        description="a list of regular expressions that fit the beginning of parameters' names, such as "
        "[lm_head, 'model.layers.2[0-9].mlp'], or null (all weights, or those of tuning.layers)",
    )
    bits: Bits | None = Field(
        title="In how many bits the frozen base of qlora is kept.",
        default=None,
        description="2, 3, 4, 6, 8, ternary, mxfp4, mxfp8 or nvfp4 (how qlora packs its base), or null (4)",
    )
    rslora: Annotated[Literal[True] | None, BeforeValidator(true_or_false)] = Field(
        title="Whether high ranks act as strongly as low ones.",
        default=None,
        description="true (adapters are scaled by alpha / the square root of rank), or null (alpha / rank)",
    )
    qat: Literal["ternary"] | None = Field(
        title="Whether all weights are trained for being rounded (quantisation-aware training), with type full.",
        default=None,
        description="ternary (the layers' linear modules compute with -s, 0 and +s, each group's s is learned, and the "
        "optimizer keeps real numbers), or null (weights as they are)",
    )
    qat_warmup: AnyLength | None = Field(
        title="Over which part of the run ternary weights come into force, in equal steps.",
        default=None,
        description=f"a duration: {LENGTHS}; 0 (from the first step on), or null (10%)",
    )
    qat_group: Annotated[Literal[64, "matrix"] | None, BeforeValidator(exact_number)] = Field(
        title="Which ternary weights share a scale; a matrix has one where BitNet's layout is to hold it.",
        default=None,
        description="64 (so many inputs of an output), matrix (one scale for a whole matrix), or null (64)",
    )
    start: RecipePath | None = Field(
        title="The earlier adapter that this one goes on from, with a fresh optimizer.",
        default=None,
        description="the path of a finished run with adapters or of an adapter's folder (mlx-lm's or PEFT's), of the "
        "same base, shape and scale ({person} stands for a daughter's name), or null (a fresh adapter)",
    )

    @property
    def of_parts(self) -> bool:
        """Whether full tuning trains parts of the model alone."""
        return self.type == "full" and (self.layers is not None or self.unfrozen_parameters is not None)


class DataSection(Section):
    path: RecipePath | None = Field(
        title="Where the rows to learn from are, and those to measure on.",
        default=None,
        description="the path of a folder with train.jsonl, or of one file; or null, with data.sources",
    )
    sources: Annotated[tuple[DataSource, ...], BeforeValidator(as_tuple), Field(max_length=MOST_SOURCES)] = (
        Field(
            title="Several such places in place of one, mixed by weight; from and to make a curriculum.",
            default=(),
            description=SOURCES,
        )
    )
    order: Literal["shuffled", "file"] = Field(
        title="In which order a pass over the rows reads them.",
        default="shuffled",
        description="shuffled (another way in each epoch) or file (as they lie there, in each epoch)",
    )
    format: Literal["auto", "chat", "completions", "text", "tokens"] = Field(
        title="What a row is; auto tells it from the first row.",
        default="auto",
        description="auto, chat, completions, text or tokens",
    )
    sequence_length: Annotated[int, Field(ge=1, le=2**24)] = Field(
        title="How many positions a row has at most: longer texts are split, longer conversations are cut.",
        description="a whole number from 1 to 16777216 (input positions per row), such as 2048",
    )
    packing: bool = Field(
        title="Whether short documents share a row, so that fewer positions are padding.",
        default=False,
        description="true or false (several documents in a row, kept apart)",
    )
    mask_prompt: bool = Field(
        title="Whether only answers are learnt: what is asked is read, and is no target.",
        default=True,
        description="true or false (no loss on prompts)",
    )
    validation_split: Annotated[float, Field(ge=0, le=0.5)] | None = Field(
        title="Which part of the rows is held out to measure on.",
        default=None,
        description="a fraction from 0 to 0.5, held out when there is no valid.jsonl; or null (none)",
    )

    @property
    def paths(self) -> tuple[Path, ...]:
        """Where rows are: data.path, or each of data.sources once."""
        return paths_of(self.sources) if self.path is None else (self.path,)

    @property
    def named(self) -> str:
        """The paths, for a sentence."""
        return ", ".join(map(str, self.paths))

    @property
    def only_path(self) -> Path:
        """data.path. UserError where there are data.sources, by those who read one place alone."""
        if self.path is None:
            raise UserError(
                f"data.sources: {self.named}: one place is needed here; give data.sources=[] and data.path=PATH"
            )
        return self.path


class BatchSection(Section):
    global_size: Count = Field(
        title="How many rows a step learns from.",
        description="a whole number of at least 1 (sequences per optimizer step, all machines together)",
    )
    micro_size: Count = Field(
        title="How many rows are in memory at a time: more is faster, and takes more memory.",
        default=1,
        description="a whole number of at least 1 (sequences that pass a layer together)",
    )
    cells: Literal["auto"] | Count = Field(
        title="Into how many groups a step's micro-batches are added; fixed for a run, for its bits follow from it.",
        default="auto",
        description="auto (the number of ranks) or a whole number from 1 to global_size / micro_size",
    )


class MemorySection(Section):
    gradient_checkpointing: bool | Literal["auto"] = Field(
        title="Whether layers are computed again in the backward pass; auto does so where memory demands it.",
        default="auto",
        description="true, false or auto",
    )
    keep_products: bool | Literal["auto"] = Field(
        title="Whether memory that is left keeps results of layers that would be computed again.",
        default="auto",
        description="true, false or auto (not on a GPU); with gradient_checkpointing auto",
    )
    activation_offload: bool | Literal["auto"] = Field(
        title="Whether inputs of recomputed layers go to a file of each rank and come back for the backward.",
        default=False,
        description="true, false or auto (where the run does not fit otherwise); writes much to the disk",
    )
    zero_stage: Annotated[Literal["auto", 0, 1, 2, 3], BeforeValidator(exact_number)] = Field(
        title="What machines divide: 0 nothing, 1 optimizer states, 2 also gradients, 3 also weights.",
        default="auto",
        description="auto, 0, 1, 2 or 3",
    )
    shares: Annotated[
        Literal["memory", "equal"] | Annotated[tuple[Share, ...], Field(min_length=1, max_length=4096)],
        BeforeValidator(as_tuple),
    ] = Field(
        title="How much of that each rank keeps: as its memory has room, alike, or as listed.",
        default="memory",
        description="memory, equal or a list of one positive number per rank, such as [2, 1]",
    )
    gradient_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        title="In which numbers a rank keeps the sums of its gradients.",
        default="auto",
        description="auto, float32 or bfloat16",
    )
    run_ahead: bool | Literal["auto"] = Field(
        title="Whether the next layers are handed to the device while one runs; not where memory would be tight.",
        default=False,
        description="true, false or auto (where it needs no more memory; not on a GPU)",
    )
    wired: Literal["auto", "off"] | Annotated[int, Field(ge=2**20, le=2**50)] = Field(
        title="How much memory macOS may neither page out nor compress.",
        default="auto",
        description="auto (where much of a Mac is needed and enough stays free), off, or a whole number of bytes from "
        "1048576",
    )
