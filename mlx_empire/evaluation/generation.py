"""Greedy answers by mlx-lm's own generation, where each machine can hold the model.

Prompts of an evaluation set form batches of a fixed size in the order of the file, dealt to the ranks; a few samples
are continued one by one, as every family can. So which prompts share a batch, and every bit of an answer, does not
depend on the number of ranks. The whole model is gathered on every rank for it, layer by layer, and let go again.
While answers are written no message moves; so each token, or batch, is told to the watchdog as progress. It lets ranks
that have written theirs wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_empire import progress
from mlx_empire.comm.protocol import Communicator
from mlx_empire.engine.trainer import Trainer
from mlx_empire.errors import UserError
from mlx_empire.model.spec import ITEM_BYTES, ModelSpec
from mlx_empire.plan.shares import RunPlan
from mlx_empire.sizes import amount

BATCH = 8  # prompts that are continued together
Processor = Callable[[mx.array, mx.array], mx.array]  # (tokens so far, logits (1, vocabulary)) -> logits


@dataclass(frozen=True)
class _Ends:
    """All that mlx-lm's function asks of a tokenizer; texts are made where the tokenizer is."""

    eos_token_ids: tuple[int, ...]

    def decode(self, tokens: Sequence[int]) -> str:
        """Nothing: tokens are wanted."""
        return ""


def generate(
    trainer: Trainer,
    comm: Communicator,
    prompts: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    ends: Sequence[int],
) -> list[list[int]]:
    """The tokens that follow each prompt, the end token aside; equal on every rank. Collective."""
    from mlx_lm import batch_generate  # imports transformers

    own: dict[int, list[int]] = {}
    with trainer.whole_model() as model:
        for number, first in enumerate(range(0, len(prompts), BATCH)):
            if number % comm.size != comm.rank:
                continue
            batch = [list(p) for p in prompts[first : first + BATCH]]
            limits = list(max_tokens[first : first + BATCH])
            answer = batch_generate(
                model,
                _Ends(tuple(ends)),
                batch,
                max_tokens=limits,
                return_token_ids=True,
                completion_batch_size=BATCH,
                prefill_batch_size=BATCH,
            )
            own |= {first + i: [int(t) for t in ids] for i, ids in enumerate(answer.token_ids)}
            progress.moved()
    return _of_all(comm, own)


def generate_each(
    trainer: Trainer,
    comm: Communicator,
    prompts: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    ends: Sequence[int],
) -> list[list[int]]:
    """As `generate`, prompt by prompt."""
    own: dict[int, list[int]] = {}
    with trainer.whole_model() as model:
        for number in range(comm.rank, len(prompts), comm.size):
            own[number] = follow(model, prompts[number], max_tokens[number], ends)
    return _of_all(comm, own)


def follow(
    model: nn.Module,
    tokens: Sequence[int],
    most: int,
    ends: Sequence[int],
    processors: Sequence[Processor] = (),
) -> list[int]:
    """At most `most` tokens that follow a prompt, the end token aside; `processors` change logits one after another."""
    from mlx_lm.generate import generate_step  # imports transformers

    found: list[int] = []
    asked = mx.array(list(tokens))
    for token, _ in generate_step(asked, model, max_tokens=most, logits_processors=list(processors)):
        progress.moved()
        if int(token) in ends:
            break
        found.append(int(token))
    return found


def _of_all(comm: Communicator, own: Mapping[int, list[int]]) -> list[list[int]]:
    """The answers of all ranks, in the order of their prompts. Collective."""
    merged: dict[int, list[int]] = {}
    for part in comm.gather_json([[i, ids] for i, ids in own.items()]):
        merged |= {int(i): ids for i, ids in part}
    return [merged[i] for i in range(len(merged))]


def refuse_too_large(plan: RunPlan, spec: ModelSpec, longest: int) -> None:
    """UserError where the whole model and the caches of a batch of `longest` tokens do not fit beside the shards."""
    for rank, needed, limit in _whole_model(plan, spec, longest):
        if needed > limit:
            raise UserError(
                f"evaluation.sets: generating answers needs the whole model on each machine: {amount(needed)} "
                f"on rank {rank}, which has {amount(limit)}; use exact_match or multiple_choice, which stream it"
            )


def holds_whole(plan: RunPlan, spec: ModelSpec, longest: int) -> bool:
    """Whether each machine has room for the whole model and those caches."""
    return all(needed <= limit for _, needed, limit in _whole_model(plan, spec, longest))


def _whole_model(plan: RunPlan, spec: ModelSpec, longest: int) -> Iterator[tuple[int, int, int]]:
    """Of each rank its number, the bytes that generating needs there, and those that it may use."""
    text = spec.text_config
    heads = int(text.get("num_key_value_heads") or text.get("num_attention_heads") or text.get("n_head") or 1)
    hidden = int(text.get("hidden_size") or text.get("n_embd") or 0)
    width = int(
        text.get("head_dim") or hidden // int(text.get("num_attention_heads") or text.get("n_head") or 1)
    )
    cache = 2 * BATCH * longest * (len(spec.units) - 1) * heads * width * ITEM_BYTES[spec.dtype]
    whole = sum(u.gathered_bytes for u in plan.shards.units)
    for rank, (ledger, limit) in enumerate(zip(plan.ledgers, plan.limits, strict=True)):
        needed = sum(ledger.resident.values()) + cache + (whole if plan.shards.zero_stage == 3 else 0)
        yield rank, needed, limit
