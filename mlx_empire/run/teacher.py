"""The teacher of a run: asked about every row once, by a streamed pass over all ranks, and never again.

Decides that teacher and student must mean the same by a token, and that the values of one (rows, teacher, temperature,
top) serve every run on them: they are kept beside the token cache, on each machine. A machine that lacks them gets them
from one that has them. Each row passes by itself, so values do not hang on micro-batches or ranks.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_empire import progress
from mlx_empire.checkpoint.manifest import config_digest, sampled_digest
from mlx_empire.cluster.hostfile import Node
from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.data.batches import single_rows
from mlx_empire.data.encode import load_tokenizer
from mlx_empire.data.rows import Rows
from mlx_empire.data.splits import Splits
from mlx_empire.data.taught import TaughtEntry, TeacherValues, load_values, writing
from mlx_empire.disk import free_bytes, with_headroom
from mlx_empire.errors import DoesNotFitError, UserError
from mlx_empire.formats.hf_folder import has_weights
from mlx_empire.model.config import read_config
from mlx_empire.model.spec import ModelSpec
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.wired_limit import fitting_plan
from mlx_empire.recipe.changes import variant
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.agree import agree_on_model, share_config, share_target
from mlx_empire.run.forward_only import FORWARD_ONLY, NO_TUNING, ROWS, frozen
from mlx_empire.run.proof import share_proof
from mlx_empire.run.trainer import explaining_memory, limit_memory, load_weights, make_trainer
from mlx_empire.sizes import amount

KEY = "distillation.teacher"
SENT = 1 << 14  # targets at once, from a machine that has their values
TOLD = 10  # how often a pass says how far it is
Values = tuple[np.ndarray, np.ndarray]  # ids (targets, top) and logs (targets, top + 1)


@dataclass(frozen=True)
class Lesson:
    """What is asked of a teacher: where its values are kept, its digest, and how many of its logits are tokens."""

    entry: TaughtEntry
    digest: str
    columns: int


def share_lesson(comm: Communicator, recipe: Recipe, spec: ModelSpec, splits: Splits) -> Lesson | None:
    """What the recipe asks of a teacher, whose folder rank 0 looks at; None without one. Collective. UserError where
    it cannot teach this model."""
    section, told = recipe.distillation, None
    if section.teacher is None:
        return None
    with together(comm):
        if comm.rank == 0:
            columns = shared_tokens(recipe, int(spec.text_config["vocab_size"]))
            told = columns, teacher_digest(section.teacher)
    columns, digest = comm.broadcast_json(told)
    how = section.top, section.temperature, recipe.numerics.attention
    return Lesson(TaughtEntry.of(splits.train, splits.digest, digest, *how), digest, columns)


def teacher_digest(teacher: Path) -> str:
    """What identifies a teacher's weights and configuration, as that of a frozen base does."""
    return hashlib.sha256(f"{sampled_digest(teacher)} {config_digest(teacher)}".encode()).hexdigest()


def shared_tokens(recipe: Recipe, vocabulary: int) -> int:
    """How many of the teacher's logits are tokens of the student, whose embedding has `vocabulary` rows: as many as the
    shorter of the two has, for longer ones are padding. UserError where tokens are not the same."""
    teacher, student, top = recipe.distillation.teacher, recipe.model.path, recipe.distillation.top
    assert teacher is not None
    config = read_config(teacher)
    if not has_weights(teacher):
        raise UserError(f"{KEY}: {teacher}: no weights are there; fetch the model again")
    theirs = int((config.get("text_config") or config).get("vocab_size") or 0)
    tokens = [_tokens(folder) for folder in (teacher, student)]
    if tokens[0] != tokens[1]:
        raise UserError(
            f"{KEY}: {teacher}: its tokenizer has other tokens than that of {student}; take a teacher of its family"
        )
    if tokens[0] is None and theirs != vocabulary:
        raise UserError(
            f"{KEY}: {teacher}: its vocabulary has {theirs:,} tokens and the model's {vocabulary:,}; take a teacher "
            "with as many"
        )
    columns = min(theirs, vocabulary)
    if top >= columns:
        raise UserError(f"distillation.top: {top}: must lie below the vocabulary's size, {columns:,}")
    return columns


def _tokens(folder: Path) -> dict[str, int] | None:
    """The tokens of a folder's tokenizer by their text; None where it has none. UserError for one that is broken."""
    if not (folder / "tokenizer_config.json").exists() and not (folder / "tokenizer.json").exists():
        return None
    found: dict[str, int] = load_tokenizer(folder).get_vocab()
    return found


def teacher_values(
    comm: Communicator, recipe: Recipe, lesson: Lesson, rows: Rows, nodes: Sequence[Node], *, thorough: bool
) -> TeacherValues:
    """The values of all `rows`: as they are kept, from another machine, or asked now. Collective. UserError or
    DoesNotFitError where the teacher cannot be asked. `thorough` as in `load_values`."""
    entry = lesson.entry
    found = load_values(entry, rows, thorough=thorough)
    have = comm.gather_json(found is not None)
    if not all(have):
        places = comm.gather_json([comm.hostname, str(entry.folder.absolute())])
        writes = not have[comm.rank] and places.index(places[comm.rank]) == comm.rank
        with together(comm):
            _require_room(entry, writes=writes)
        holder = have.index(True) if any(have) else None
        asked = partial(_asked, comm, recipe, lesson, rows, nodes)
        values = asked() if holder is None else _sent(comm, found, holder, entry)
        _write(comm, entry, values, writes=writes)
        found = found or load_values(entry, rows, thorough=False)
        with together(comm):
            if found is None:
                raise UserError(
                    f"{KEY}: {entry.folder}: what was written there cannot be read; look at that disk"
                )
    assert found is not None
    return found


def _require_room(entry: TaughtEntry, *, writes: bool) -> None:
    needed = with_headroom(entry.nbytes)
    if writes and (free := free_bytes(entry.folder)) < needed:
        raise DoesNotFitError(
            f"{KEY}: its values of {entry.targets:,} targets take {amount(needed)} and {amount(free)} are free for "
            f"{entry.folder}; free some room, set MLX_EMPIRE_CACHE to another disk or lower distillation.top"
        )


@contextmanager
def _told(entry: TaughtEntry) -> Iterator[None]:
    """What a disk says against writing an entry, as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{KEY}: {entry.folder}: {error.strerror or error}; set MLX_EMPIRE_CACHE to a folder that can be written"
        ) from None


def _write(comm: Communicator, entry: TaughtEntry, values: Iterable[Values], *, writes: bool) -> None:
    """Keep all values on the ranks that write. Collective, group by group."""
    with ExitStack() as stack:
        with together(comm), _told(entry):
            writer = stack.enter_context(writing(entry)) if writes else None
        for ids, logs in values:
            with together(comm), _told(entry):
                if writer is not None:
                    writer.add(ids, logs)
        with together(comm), _told(entry):
            if writer is not None:
                writer.publish()


def _sent(
    comm: Communicator, found: TeacherValues | None, holder: int, entry: TaughtEntry
) -> Iterator[Values]:
    """The values as `holder` has them. Collective."""
    for first in range(0, entry.targets, SENT):
        own = None
        if found is not None and comm.rank == holder:
            own = found.ids[first : first + SENT], found.logs[first : first + SENT]
        yield _gathered(comm, [] if own is None else [own], entry.top)


def _gathered(comm: Communicator, own: Sequence[Values], top: int) -> Values:
    """The values of all ranks, one rank's after another's. Collective."""
    parts = []
    for part, (columns, dtype) in enumerate(((top, np.int32), (top + 1, np.float16))):
        flat = np.concatenate([np.empty(0, dtype), *(one[part].reshape(-1) for one in own)])
        parts.append(np.concatenate(comm.gather_arrays(flat)).reshape(-1, columns))
    return parts[0], parts[1]


def _asked(
    comm: Communicator, recipe: Recipe, lesson: Lesson, rows: Rows, nodes: Sequence[Node]
) -> Iterator[Values]:
    """The pass itself: the teacher planned, loaded and streamed as a run is, its rows dealt to the ranks in order.
    Collective."""
    asked = asked_recipe(recipe, comm.size)
    agree_on_model(comm, asked)
    config = share_config(comm, asked)
    target = share_proof(comm, asked, config, frozen(share_target(comm, asked, config)))
    with together(comm):
        plan = fitting_plan(asked, target.spec, nodes, state_bytes_of(asked.optimizer))
        limit_memory(plan, comm.rank, asked.memory.wired, nodes[comm.rank])
    progress.reach("load")
    tell = _telling(comm, recipe, lesson.entry, len(rows))
    with explaining_memory(plan, comm.rank), CommThread() as thread:
        trainer = make_trainer(comm, thread, asked, target, plan)
        load_weights(comm, asked, target, trainer.store)
        trainer.prepare(packing=asked.data.packing, fresh=False)
        progress.reach("evaluate")
        how = lesson.columns, lesson.entry.top, recipe.distillation.temperature
        group = comm.size * ROWS
        for first in range(0, len(rows), group):
            start = first + comm.rank * ROWS
            own = trainer.streamed.likeliest(single_rows(rows, start, start + ROWS), *how)
            yield _gathered(comm, own, lesson.entry.top)
            progress.advance()
            tell(min(first + group, len(rows)))
    del trainer
    gc.collect()
    mx.clear_cache()


def asked_recipe(recipe: Recipe, ranks: int) -> Recipe:
    """The recipe of the teacher's pass on so many ranks: its own dtype, every row by itself, nothing trained.

    It still names a teacher: so the ledger has room for a distilling head, which needs more than the likeliest tokens.
    """
    changes: dict[str, Any] = {
        **FORWARD_ONLY,
        **NO_TUNING,
        "model.path": recipe.distillation.teacher,
        "model.dtype": None,
        "model.base_digest": None,
        "batch.global_size": ROWS * ranks,
        "distillation.teacher": recipe.distillation.teacher,
    }
    return variant(recipe, changes)


def _telling(comm: Communicator, recipe: Recipe, entry: TaughtEntry, rows: int) -> Callable[[int], None]:
    """What rank 0 says of a pass over so many rows: at its beginning, and now and then how far it is."""

    def say(text: str) -> None:
        if comm.rank == 0:
            print(text, flush=True)

    say(
        f"{KEY}: {recipe.distillation.teacher} is asked once about {rows:,} rows: {entry.targets:,} targets, "
        f"{amount(entry.nbytes)} in {entry.folder}"
    )
    due = iter([-(-rows * part // TOLD) for part in range(1, TOLD + 1)])
    following = next(due)

    def tell(done: int) -> None:
        nonlocal following
        if done >= following:
            say(f"{KEY}: {done:,} of {rows:,} rows")
            following = next((one for one in due if one > done), rows + 1)

    return tell
