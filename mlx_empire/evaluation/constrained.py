"""Greedy answers that a grammar keeps within a JSON schema: the *constrained* column beside the free one.

Before each token the grammar (the library llguidance) says which tokens may follow, and the likeliest of those is
taken. So an answer that comes to its end is JSON that the schema allows, whatever the model knows; one that is cut at
`max_tokens` is not, so a schema bounds its texts and lists (`maxLength`, `maxItems`). Nothing is put between the parts
of JSON but what the schema asks for, for blanks without end would also be allowed.

Rank 0 alone writes these, prompt by prompt: it has the tokenizer, and no bit depends on the number of ranks. The others
wait for as long as it goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.engine.trainer import Trainer
from mlx_empire.errors import UserError
from mlx_empire.evaluation.generation import Processor, follow
from mlx_empire.recipe.text import first_line, words_of

COMPACT = {"whitespace_flexible": False}


class Grammar:
    """What may follow, by a model's tokenizer. `tokenizer`: mlx-lm's; `vocabulary`: as wide as the logits are;
    `ends`: the tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Sequence[int]) -> None:
        from llguidance.hf import from_tokenizer

        self._end = np.zeros(vocabulary, bool)
        self._end[list(ends)] = True
        try:
            self._tokens = from_tokenizer(getattr(tokenizer, "_tokenizer", tokenizer), vocabulary, list(ends))
        except ValueError as error:
            raise UserError(
                f"evaluation.sets: constrained: this tokenizer is none that a grammar can read ({words_of(error)})"
            ) from None

    def refuse(self, schema: Any, where: str) -> None:
        """UserError for a schema that the grammar library cannot keep answers within."""
        from llguidance import LLMatcher

        wrong, said = LLMatcher.validate_grammar_with_warnings(_grammar(schema), self._tokens)
        if wrong:
            raise UserError(f"{where}: schema: cannot be held by a grammar: {first_line(said[0])}")

    def processor(self, schema: Any) -> Processor:
        """A logits processor of mlx-lm for one answer."""
        from llguidance import LLMatcher
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        matcher = LLMatcher(self._tokens, _grammar(schema))
        mask = allocate_token_bitmask(1, self._tokens.vocab_size)
        began = False

        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            nonlocal began
            if began and not matcher.is_stopped():
                matcher.consume_token(tokens[-1].item())
            began = True
            allowed = self._end  # where nothing may follow the library stops before an end token
            if not matcher.is_stopped():
                fill_next_token_bitmask(matcher, mask)
                allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(self._end)].astype(bool)
            return mx.where(mx.array(allowed), logits, -mx.inf)

        return process


def _grammar(schema: Any) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=COMPACT))


def generate_constrained(
    trainer: Trainer,
    comm: Communicator,
    grammar: Grammar | None,
    prompts: Sequence[tuple[Sequence[int], Any]],
    max_tokens: Sequence[int],
    ends: Sequence[int],
) -> list[list[int]]:
    """The tokens that follow each prompt within its schema, the end token aside: nothing but on rank 0, which has the
    `grammar`. `prompts`: (tokens, schema). Collective.
    """
    found: list[list[int]] = []
    with trainer.whole_model() as model, together(comm):
        if grammar is not None:
            for (tokens, schema), most in zip(prompts, max_tokens, strict=True):
                found.append(follow(model, tokens, most, ends, [grammar.processor(schema)]))
    return found
