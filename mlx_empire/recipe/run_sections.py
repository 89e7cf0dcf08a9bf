"""The sections of a recipe on how a run is carried out: exchanges, watches, reports, checkpoints.

Fields as in `sections`. No key here but run.steps, run.seed, numerics.attention, what numerics.spikes leaves out, how
float16 is scaled and, on a GPU, numerics.bits changes a result.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from mlx_empire.recipe.fields import (
    OFTEN,
    Count,
    KeyName,
    PositiveDuration,
    RecipePath,
    RunLength,
    Section,
    as_tuple,
    power_of_two,
    step_as_text,
    true_or_false,
)
from mlx_empire.recipe.notices import NOTIFY, Notify

SHORT_ROW = 256  # positions: in rows up to here numerics.attention decides nothing


class CommSection(Section):
    route: Literal["auto", "relay", "direct"] = Field(
        title="Whether all-gathers go from each machine to each, or from one to the next around a ring.",
        default="auto",
        description="auto, relay or direct",
    )
    bucket_bytes: Annotated[int, Field(ge=4096, le=2**30)] = Field(
        title="How much is sent in one message.",
        default=2**22,
        description="a whole number of bytes from 4096 to 1073741824",
    )
    deadline_seconds: Annotated[float, Field(gt=0, le=604800)] = Field(
        title="How long a machine may hang before the run ends and says which one.",
        default=1800.0,
        description="a number of seconds above 0 and up to 604800: the longest that a machine may show no progress "
        "(in a layer, a file, a pause of its own) before the run is ended",
    )
    deadline_floor_seconds: Annotated[float, Field(gt=0, le=604800)] = Field(
        title="The least of the deadlines that follow from how long steps take.",
        default=60.0,
        description="a number of seconds above 0 and up to 604800: once a few steps are done, their phases may take "
        "ten times as long as they did, but at least this and at most comm.deadline_seconds",
    )


class NumericsSection(Section):
    spikes: Literal["off", "log", "skip", "rollback"] = Field(
        title="What is done about a step whose loss or gradient norm leaps.",
        default="log",
        description="off, log, skip (leave the update of a step out whose loss or gradient norm leaps) or rollback (go "
        "back to the last checkpoint, and on with the data after the leap)",
    )
    threshold: Annotated[float, Field(ge=2, le=1e6)] = Field(
        title="How far above the last steps is a leap.",
        default=10.0,
        description="a number from 2 to 1000000 (robust standard deviations above the median that make a leap)",
    )
    window: Annotated[int, Field(ge=16, le=4096)] = Field(
        title="How many of the last steps that is measured by.",
        default=64,
        description="a whole number from 16 to 4096 (the steps that a step is compared with)",
    )
    max_skips: Annotated[int, Field(ge=0, le=4096)] = Field(
        title="How many steps may be skipped before the run ends.",
        default=8,
        description="a whole number from 0 to 4096 (skipped steps among the last `window` ones)",
    )
    attention: Literal["auto", "pattern", "mask"] = Field(
        title=f"Whether attention of rows above {SHORT_ROW} positions leaves out what masks hide, or computes it all.",
        default="auto",
        description="auto (pattern, but a run that began with mask goes on so), pattern (block by block, without what "
        "causal, window and chunk masks and documents hide) or mask (MLX's own way)",
    )
    loss_scale: Annotated[
        Literal["auto"] | Annotated[float, Field(ge=1, le=2**24)], BeforeValidator(power_of_two)
    ] = Field(
        title="What losses are multiplied by before the backward pass, so that small gradients survive float16.",
        default="auto",
        description="auto (with float16 dynamic: halved where gradients overflow, whose step is left out, and doubled "
        "after loss_scale_window steps without; else 1) or a power of two from 1 to 16777216, which stays",
    )
    loss_scale_window: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        title="After how many steps in a row without an overflow a dynamic loss scale doubles.",
        default=2000,
        description="a whole number of steps from 1 to 1000000",
    )
    compiled_layers: bool = Field(
        title="Whether layers that are alike run by one trace, with what is element-wise fused, not call by call.",
        default=False,
        description="true (the same bits on a CPU; not proven on Metal) or false",
    )
    bits: Literal["strict", "fast"] = Field(
        title="Whether a layer's forward takes the kernels that its recomputation takes.",
        default="strict",
        description="strict (it does, and a run that goes on elsewhere recomputes and keeps what its checkpoint notes, "
        "for on a GPU the last bits may hang on both) or fast (it takes those of inference, and what is recomputed and "
        "kept follows memory alone; on a CPU the bits are the same)",
    )


class ReportSection(Section):
    tensorboard: bool = Field(
        title="Whether figures also go to TensorBoard (the package tensorboardX).",
        default=False,
        description="true or false",
    )
    trace: bool = Field(
        title="Whether the first steps are drawn action by action.",
        default=False,
        description="true (trace.json of the first steps, for ui.perfetto.dev) or false",
    )
    progress: Literal["auto", "always", "never"] = Field(
        title="Whether progress is redrawn in place, or told line by line.",
        default="auto",
        description="auto (when this is a terminal), always or never",
    )
    log_every: PositiveDuration | None = Field(
        title="How often a step is told in a line, where it is not redrawn; metrics.jsonl has every step.",
        default=None,
        description=f"a duration above 0: {OFTEN}; or null (every step)",
    )
    samples: Annotated[int, Field(ge=0, le=8)] = Field(
        title="How many held-out rows are shown as the model reads and continues them, at first and now.",
        default=0,
        description="a whole number from 0 to 8 (held-out rows that each evaluation also reads, for mlx-empire open)",
    )
    notify: Notify | None = Field(
        title="Where the launcher posts a sentence when a run ends, fails, restarts, stalls or meets its gate.",
        default=None,
        description=NOTIFY,
    )


class DaughtersSection(Section):
    replay: Annotated[float, Field(ge=0, le=1)] | None = Field(
        title="Which part of the rows that a daughter knows already a new generation learns again.",
        default=None,
        description="a fraction from 0 to 1 of the old rows, chosen by their hash; or null (0.25)",
    )


class RunSection(Section):
    dir: RecipePath = Field(
        title="Where metrics, checkpoints and the result go.",
        description="the path of a folder for what the run leaves behind",
    )
    steps: RunLength = Field(
        title="How long the run is.",
        description="a duration above 0: steps (100), counted targets (5Mtok) or epochs (1ep)",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        title="What decides the order of rows, and what is drawn at random.",
        default=0,
        description="a whole number from 0 to 4294967295",
    )
    save_every: PositiveDuration | None = Field(
        title="How often a checkpoint is written, and so how much a crash can cost.",
        default=None,
        description=f"a duration above 0: {OFTEN}; or null (no checkpoints)",
    )
    keep_last: Count | None = Field(
        title="How many checkpoints are kept; a file KEEP in one's folder keeps it too.",
        default=None,
        description="a whole number of at least 1 (the newest checkpoints that are kept), or null (all)",
    )
    buddy: Annotated[Literal["auto", True, False], BeforeValidator(true_or_false)] = Field(
        title="Whether each machine also keeps a copy of another's part, for a machine that dies takes its disk along.",
        default="auto",
        description="auto (where disks allow), true or false (each node keeps a copy of another node's shards)",
    )
    checkpoints: RecipePath | None = Field(
        title="Where checkpoints go, if not into the run's folder.",
        default=None,
        description="the path of each node's folder for checkpoints, in which {rank} and {host} stand for the "
        "rank's number and the host's name; or null (checkpoints in run.dir)",
    )
    eval_every: PositiveDuration | None = Field(
        title="How often the model is measured on held-out rows and evaluation.sets.",
        default=None,
        description=f"a duration above 0: {OFTEN}; or null (never)",
    )
    eval_batches: Count | None = Field(
        title="On how many held-out micro-batches, of a fixed choice, it is measured.",
        default=None,
        description="a whole number of at least 1, or null (the whole validation split)",
    )
    resume: Annotated[str, BeforeValidator(step_as_text), Field(min_length=1, max_length=4096)] = Field(
        title="From where a run goes on that was begun before.",
        default="auto",
        description="auto (the newest whole checkpoint), never, a step such as 300, or the path of a checkpoint",
    )
    accept_changes: Annotated[tuple[KeyName, ...], BeforeValidator(as_tuple), Field(max_length=256)] = Field(
        title="Which keys may differ from those of the checkpoint that a run goes on from.",
        default=(),
        description="a list of keys that may differ from the checkpoint's recipe, such as [run.steps]",
    )
    hosts: RecipePath | None = Field(
        title="Which machines there are, where mpirun's own hostfile cannot be found.",
        default=None,
        description="the path of a hostfile, or null",
    )
