"""The sections of a recipe but `evaluation`: their keys, types, ranges and defaults.

Every field's description says what it accepts; messages and documentation are made from it, so it completes the
sentence "expected ...".
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mlx_empire.recipe.duration import Duration
from mlx_empire.recipe.text import printable

MAX_COUNT = 2**31 - 1


def _path(written: object) -> object:
    if isinstance(written, Path):
        written = str(written)
    if not isinstance(written, str) or not printable(written) or not 0 < len(written) <= 4096:
        raise ValueError("not a path")
    try:
        return Path(written).expanduser()
    except RuntimeError:
        raise ValueError("no such home directory") from None


def as_tuple(value: object) -> object:
    """YAML's lists as tuples, which do not change."""
    return tuple(value) if isinstance(value, list) else value


RecipePath = Annotated[Path, BeforeValidator(_path)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]


class Section(BaseModel):
    """What all sections share: no unknown keys, no silent conversion of types, no change after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _exact_number(value: object) -> object:
    """Keeps true and 1.0 from passing as the literal 1."""
    if isinstance(value, bool | float):
        raise ValueError("not a whole number")
    return value


def _checkpoint(written: object) -> object:
    """A step may be written as a number."""
    step = isinstance(written, int) and not isinstance(written, bool) and written > 0
    return str(written) if step else written


def _positive_duration(written: object) -> Duration:
    duration = Duration.parse(written)
    if duration.value == 0:
        raise ValueError("zero")
    return duration


def _whole_run(written: object) -> Duration:
    duration = _positive_duration(written)
    if duration.unit == "percent":
        raise ValueError("run.steps cannot be a percentage of itself")
    return duration


AnyDuration = Annotated[Duration, BeforeValidator(Duration.parse)]
PositiveDuration = Annotated[Duration, BeforeValidator(_positive_duration)]
RunLength = Annotated[Duration, BeforeValidator(_whole_run)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Bits = Annotated[Literal[2, 3, 4, 6, 8, "ternary", "mxfp4", "mxfp8", "nvfp4"], BeforeValidator(_exact_number)]
KeyName = Annotated[str, Field(pattern=r"^[a-z_]+\.[a-z_]+$")]
Share = Annotated[float, Field(gt=0, le=1e15)]


class ModelSection(Section):
    path: RecipePath = Field(description="the path of a local Hugging Face folder")
    architecture: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="a catalog name such as llama-4-scout-109b, for planning when the folder is not there",
    )
    dtype: Literal["bfloat16", "float32"] | None = Field(
        default=None, description="bfloat16 or float32 (compute and wire), or null (as stored in the folder)"
    )
    init: Literal["pretrained", "random"] = Field(
        default="pretrained", description="pretrained or random (built from config.json alone)"
    )
    compare: Literal["headers", "contents"] = Field(
        default="headers",
        description="headers or contents (what of the folder must be equal on all machines that have it; contents "
        "reads every weight once more)",
    )
    base_digest: str | None = Field(
        default=None,
        pattern=r"^sha256:[0-9a-f]{64}$",
        description="the digest of a frozen folder (sha256:...), as its FROZEN.json says, or null (any folder)",
    )


class TuningSection(Section):
    type: Literal["full", "lora", "dora", "qlora"] = Field(
        default="full", description="full, lora, dora or qlora"
    )
    rank: Count | None = Field(
        default=None, description="a whole number of at least 1 (the adapters' rank), or null (8)"
    )
    alpha: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None, description="a number above 0 (adapters are scaled by alpha / rank), or null (2 x rank)"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="a number from 0 to below 1 (of an adapter's input), or null (0)"
    )
    targets: Annotated[
        Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1, max_length=64)] | None,
        BeforeValidator(as_tuple),
    ] = Field(
        default=None,
        description="all-linear, a list of module names such as [q_proj, v_proj, experts, lm_head], or null",
    )
    layers: Count | None = Field(
        default=None, description="a whole number (adapters in the last so many layers), or null (all)"
    )
    bits: Bits | None = Field(
        default=None,
        description="2, 3, 4, 6, 8, ternary, mxfp4, mxfp8 or nvfp4 (how qlora packs its base), or null (4)",
    )
    rslora: Literal[True] | None = Field(
        default=None,
        description="true (adapters are scaled by alpha / the square root of rank), or null (alpha / rank)",
    )


class DataSection(Section):
    path: RecipePath = Field(description="the path of a folder with train.jsonl, or of one file")
    format: Literal["auto", "chat", "completions", "text", "tokens"] = Field(
        default="auto", description="auto, chat, completions, text or tokens"
    )
    sequence_length: Annotated[int, Field(ge=1, le=2**24)] = Field(
        description="a whole number from 1 to 16777216 (input positions per row), such as 2048"
    )
    packing: bool = Field(default=False, description="true or false (several documents in a row, kept apart)")
    mask_prompt: bool = Field(default=True, description="true or false (no loss on prompts)")
    validation_split: Annotated[float, Field(ge=0, le=0.5)] | None = Field(
        default=None,
        description="a fraction from 0 to 0.5, held out when there is no valid.jsonl; or null (none)",
    )


class BatchSection(Section):
    global_size: Count = Field(
        description="a whole number of at least 1 (sequences per optimizer step, all machines together)"
    )
    micro_size: Count = Field(
        default=1, description="a whole number of at least 1 (sequences that pass a layer together)"
    )
    cells: Literal["auto"] | Count = Field(
        default="auto",
        description="auto (the number of ranks) or a whole number from 1 to global_size / micro_size",
    )


class OptimizerSection(Section):
    name: Literal["adamw", "lion", "sgd"] = Field(
        default="adamw", description="adamw, lion or sgd (with momentum, the first of betas)"
    )
    learning_rate: Annotated[float, Field(gt=0, le=10)] = Field(
        description="a number above 0 and up to 10, such as 1e-5"
    )
    weight_decay: Annotated[float, Field(ge=0, le=10)] = Field(
        default=0.0, description="a number from 0 to 10"
    )
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(as_tuple)] = Field(
        default=(0.9, 0.999), description="a list of two numbers from 0 to below 1, such as [0.9, 0.999]"
    )
    eps: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1e-8, description="a number above 0 and up to 1, such as 1e-8"
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="a number above 0 (the largest global gradient norm), or null (no clipping)"
    )
    state_bits: Annotated[Literal[8, 32], BeforeValidator(_exact_number)] = Field(
        default=32, description="8 or 32 (bits per optimizer state)"
    )
    master_weights: Literal["exact", "diet", "fp32", "none"] = Field(
        default="exact",
        description="exact (2 bytes more than bfloat16, all of float32), diet (1 byte), fp32 (4) or none",
    )
    statistics_every: Count | None = Field(
        default=100,
        description="a whole number of steps (after which metrics.jsonl also says how the states are), or null",
    )
    in_backward: bool = Field(
        default=False,
        description="true (a unit is updated as soon as its gradient is complete, which is not kept; clipped by the "
        "norm of the last step) or false",
    )


class ScheduleSection(Section):
    type: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="constant, cosine or linear"
    )
    warmup: AnyDuration = Field(
        default=Duration(0),
        description="a duration: steps (100), percent (3%), tokens (5Mtok) or epochs (1ep); or 0",
    )
    final: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="a number from 0 to 1 (the fraction of the learning rate that is left at the end)",
    )


class MemorySection(Section):
    gradient_checkpointing: bool | Literal["auto"] = Field(default="auto", description="true, false or auto")
    zero_stage: Annotated[Literal["auto", 0, 1, 2, 3], BeforeValidator(_exact_number)] = Field(
        default="auto", description="auto, 0, 1, 2 or 3"
    )
    shares: Annotated[
        Literal["memory", "equal"] | Annotated[tuple[Share, ...], Field(min_length=1, max_length=4096)],
        BeforeValidator(as_tuple),
    ] = Field(
        default="memory",
        description="memory, equal or a list of one positive number per rank, such as [2, 1]",
    )
    gradient_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto, float32 or bfloat16"
    )
    wired: Literal["auto", "off"] | Annotated[int, Field(ge=2**20, le=2**50)] = Field(
        default="auto",
        description="auto (where much of a Mac is needed and enough stays free), off, or a whole number of bytes from "
        "1048576 (memory that macOS may not page out or compress)",
    )


class CommSection(Section):
    route: Literal["auto", "relay", "direct"] = Field(default="auto", description="auto, relay or direct")
    bucket_bytes: Annotated[int, Field(ge=4096, le=2**30)] = Field(
        default=2**22, description="a whole number of bytes from 4096 to 1073741824"
    )
    deadline_seconds: Annotated[float, Field(gt=0, le=604800)] = Field(
        default=1800.0,
        description="a number of seconds above 0 and up to 604800: the longest that a machine may show no progress "
        "(in a layer, a file, a pause of its own) before the run is ended",
    )
    deadline_floor_seconds: Annotated[float, Field(gt=0, le=604800)] = Field(
        default=60.0,
        description="a number of seconds above 0 and up to 604800: once a few steps are done, their phases may take "
        "ten times as long as they did, but at least this and at most comm.deadline_seconds",
    )


class NumericsSection(Section):
    spikes: Literal["off", "log", "skip", "rollback"] = Field(
        default="log",
        description="off, log, skip (leave the update of a step out whose loss or gradient norm leaps) or rollback (go "
        "back to the last checkpoint, and on with the data after the leap)",
    )
    threshold: Annotated[float, Field(ge=2, le=1e6)] = Field(
        default=10.0,
        description="a number from 2 to 1000000 (robust standard deviations above the median that make a leap)",
    )
    window: Annotated[int, Field(ge=16, le=4096)] = Field(
        default=64, description="a whole number from 16 to 4096 (the steps that a step is compared with)"
    )
    max_skips: Annotated[int, Field(ge=0, le=4096)] = Field(
        default=8, description="a whole number from 0 to 4096 (skipped steps among the last `window` ones)"
    )


class ReportSection(Section):
    tensorboard: bool = Field(default=False, description="true or false")
    trace: bool = Field(
        default=False, description="true (trace.json of the first steps, for ui.perfetto.dev) or false"
    )
    progress: Literal["auto", "always", "never"] = Field(
        default="auto", description="auto (when this is a terminal), always or never"
    )


class RunSection(Section):
    dir: RecipePath = Field(description="the path of a folder for what the run leaves behind")
    steps: RunLength = Field(description="a duration above 0: steps (100), tokens (5Mtok) or epochs (1ep)")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0, description="a whole number from 0 to 4294967295"
    )
    save_every: PositiveDuration | None = Field(
        default=None,
        description="a duration above 0: steps (100), percent (3%), tokens (5Mtok) or epochs (1ep); or null (no "
        "checkpoints)",
    )
    keep_last: Count | None = Field(
        default=None,
        description="a whole number of at least 1 (the newest checkpoints that are kept), or null (all)",
    )
    buddy: Literal["auto", True, False] = Field(
        default="auto",
        description="auto (where disks allow), true or false (each node keeps a copy of another node's shards)",
    )
    checkpoints: RecipePath | None = Field(
        default=None,
        description="the path of each node's folder for checkpoints, in which {rank} and {host} stand for the "
        "rank's number and the host's name; or null (checkpoints in run.dir)",
    )
    eval_every: PositiveDuration | None = Field(
        default=None,
        description="a duration above 0: steps (100), percent (3%), tokens (5Mtok) or epochs (1ep); or null",
    )
    eval_batches: Count | None = Field(
        default=None, description="a whole number of at least 1, or null (the whole validation split)"
    )
    resume: Annotated[str, BeforeValidator(_checkpoint), Field(min_length=1, max_length=4096)] = Field(
        default="auto",
        description="auto (the newest whole checkpoint), never, a step such as 300, or the path of a checkpoint",
    )
    accept_changes: Annotated[tuple[KeyName, ...], BeforeValidator(as_tuple), Field(max_length=256)] = Field(
        default=(),
        description="a list of keys that may differ from the checkpoint's recipe, such as [run.steps]",
    )
    hosts: RecipePath | None = Field(default=None, description="the path of a hostfile, or null")
