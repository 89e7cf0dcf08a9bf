"""Decides which token ids a row becomes and which of them are training targets (BOS, EOS, prompt masks)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_empire import progress
from mlx_empire.data.files import RawRow, check_row
from mlx_empire.errors import UserError
from mlx_empire.recipe.text import words_of

if TYPE_CHECKING:
    from mlx_empire.data.chat import ChatReader, Remarks
    from mlx_empire.data.messages import Messages
    from mlx_empire.data.spans import Span

BATCH = 256  # rows tokenised together: the tokenizer's own threads share them


@dataclass(frozen=True)
class Document:
    """One row's tokens (n,) int32 and the uint8 flags (n,) of those that count as targets."""

    where: str
    tokens: np.ndarray
    counted: np.ndarray


@dataclass(frozen=True)
class _Rendered:
    where: str
    text: str
    spans: list[Span] | None  # characters that are targets; None: all


def load_tokenizer(folder: Path | None) -> Any:
    """mlx-lm's tokenizer of a local folder: the same templates as `mlx_lm.generate` uses. No download.

    Errors: UserError when the folder or its tokenizer files are missing or unreadable.
    """
    if folder is None or not folder.is_dir():
        raise UserError(
            f"model.path {folder}: no such folder, and this data.format needs the model's tokenizer"
        )
    from mlx_lm.utils import load_tokenizer as load  # imports MLX and transformers: only where text is read

    try:
        return load(folder, {"local_files_only": True, "trust_remote_code": False}, _end_ids(folder))
    except Exception as error:  # transformers raises anything from OSError to KeyError
        raise UserError(
            f"model.path {folder}: no tokenizer can be loaded from it ({words_of(error)}); "
            "put tokenizer.json and tokenizer_config.json there"
        ) from error


def _end_ids(folder: Path) -> list[int] | None:
    """What ends a sequence, by generation_config.json or else config.json, as `mlx_lm.load` reads them."""
    from mlx_lm.utils import load_config

    try:
        ids = load_config(folder).get("eos_token_id")
    except (FileNotFoundError, ValueError):
        return None
    found = [number for number in (ids if isinstance(ids, list) else [ids]) if type(number) is int]
    return found or None


def encode_rows(
    rows: Iterable[RawRow],
    data_format: str,
    tokenizer: Any,
    mask_prompt: bool,
    vocab_size: int | None,
    remarks: Remarks | None = None,
) -> Iterator[Document]:
    """Turn raw rows into documents, in order. `tokenizer` may be None for format `tokens`. `remarks` collects what
    the user should be told about conversations.

    Errors: UserError naming file and line for rows of another format, broken rows and ids outside the
    vocabulary.
    """
    remaining = iter(rows)
    # A run whose tokens are in the cache renders nothing.
    from mlx_empire.data.chat import ChatReader

    reader = ChatReader(tokenizer, remarks) if data_format != "tokens" else None
    while batch := list(islice(remaining, BATCH)):
        progress.advance()
        for row in batch:
            check_row(row, data_format)
        if reader is None:
            documents = [_all_targets(row.where, row.value["tokens"]) for row in batch]
        else:
            documents = _encode_batch(batch, data_format, tokenizer, reader, mask_prompt)
        for document in documents:
            largest = int(document.tokens.max(initial=-1))
            if vocab_size is not None and largest >= vocab_size:
                raise UserError(
                    f"{document.where}: token id {largest} is outside the model's vocabulary of "
                    f"{vocab_size}; use the tokenizer and the tokens that belong to model.path"
                )
            yield document


def uses_template(data_format: str, tokenizer: Any) -> bool:
    """Whether rows go through the chat template: chat always, completions where there is one (as mlx-lm)."""
    return data_format == "chat" or (data_format == "completions" and tokenizer.has_chat_template)


def check_tokenizer(data_format: str, tokenizer: Any, folder: Path | None) -> None:
    """Raise UserError when `tokenizer` lacks what `data_format` needs: a chat template or an EOS token."""
    if data_format == "chat" and not tokenizer.has_chat_template:
        raise UserError(
            f"data.format chat: the tokenizer in {folder} has no chat template; "
            "add chat_template.jinja to that folder or use format completions or text"
        )
    if not uses_template(data_format, tokenizer) and tokenizer.eos_token_id is None:
        raise UserError(
            f"data.format {data_format}: the tokenizer in {folder} has no eos_token, so no row could end; "
            "name one in tokenizer_config.json"
        )


def _encode_batch(
    rows: list[RawRow], data_format: str, tokenizer: Any, reader: ChatReader, mask_prompt: bool
) -> list[Document]:
    rendered = [_render(row, data_format, tokenizer, reader, mask_prompt) for row in rows]
    template = uses_template(data_format, tokenizer)
    masked = any(row.spans is not None for row in rendered)
    for row in rendered:
        try:
            row.text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{row.where}: a lone surrogate (\\ud800-\\udfff) is not text; remove it"
            ) from error
    # A template writes its own special tokens; elsewhere each text gets those that it lacks of the tokenizer's.
    # mlx-lm's wrapper has no batches and no offsets, hence the transformers tokenizer inside it.
    encoded = tokenizer._tokenizer(
        [row.text for row in rendered],
        add_special_tokens=False,
        return_offsets_mapping=masked and tokenizer.is_fast,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    head, tail = ([], []) if template else _added(tokenizer)
    documents = []
    for index, row in enumerate(rendered):
        ids = list(encoded["input_ids"][index])
        if row.spans is None:
            flags = np.ones(len(ids), np.uint8)
        elif tokenizer.is_fast:
            flags = _flags_by_offset(encoded["offset_mapping"][index], row.spans)
        else:
            flags = _flags_by_prefix(tokenizer, row, ids)
        if not template and row.text:
            ids, flags = _framed(ids, flags, head, tail, tokenizer.eos_token_id)
        tokens = np.asarray(ids, np.int32)
        bos = tokenizer.bos_token_id
        if bos is not None and bos not in tokenizer.eos_token_ids:  # GPT-2's ends documents too
            flags[tokens == bos] = 0
        flags[:1] = 0
        documents.append(Document(row.where, tokens, flags))
    return documents


def encode_prompt(tokenizer: Any, row: RawRow, messages: Messages) -> list[int]:
    """The tokens after which the assistant answers `messages`, as in training. Errors: UserError, and what a
    template raises."""
    if tokenizer.has_chat_template:
        from mlx_empire.data.chat import ChatReader  # see `encode_rows`

        text = ChatReader(tokenizer).prompt(row, messages)
        return [int(t) for t in tokenizer.encode(text, add_special_tokens=False)]
    ids = [int(t) for t in tokenizer.encode(str(messages[-1]["content"]), add_special_tokens=False)]
    head, _ = _added(tokenizer)
    return ids if ids[: len(head)] == head else head + ids


def encode_continuation(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], int]:
    """The tokens of a plain text, and how many come before its continuation, which blanks at the end of the context
    belong to. As lm-eval divides them; what the tokenizer puts before every text comes first. UserError as `_added`.
    """
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    head, _ = _added(tokenizer)
    before = [int(t) for t in tokenizer.encode(context, add_special_tokens=False)]
    ids = [int(t) for t in tokenizer.encode(context + continuation, add_special_tokens=False)]
    return (ids, len(before)) if ids[: len(head)] == head else (head + ids, len(head) + len(before))


def _render(
    row: RawRow, data_format: str, tokenizer: Any, reader: ChatReader, mask_prompt: bool
) -> _Rendered:
    if data_format == "text":
        return _Rendered(row.where, row.value["text"], None)
    if data_format == "completions":
        prompt, completion = row.value["prompt"], row.value["completion"]
        if not uses_template(data_format, tokenizer):
            whole = prompt + completion
            return _Rendered(row.where, whole, [(len(prompt), len(whole))] if mask_prompt else None)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    else:
        messages = row.value["messages"]
    text, spans = reader.render(row, messages, mask_prompt)
    return _Rendered(row.where, text, spans)


def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after every text: BOS, EOS, both or nothing. Errors: UserError where it
    does more than that."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a", add_special_tokens=True)
    for start in range(len(full)):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise UserError(
        f"the tokenizer in {tokenizer.name_or_path} does not add its special tokens around a text, so where they go "
        "cannot be told; use data.format tokens"
    )


def _framed(
    ids: list[int], flags: np.ndarray, head: list[int], tail: list[int], end: int
) -> tuple[list[int], np.ndarray]:
    """A text's ids and flags with head, tail and end token, none of them twice; only the end token is a target."""
    if ids[: len(head)] != head:
        ids, flags = head + ids, np.pad(flags, (len(head), 0))
    if ids[len(ids) - len(tail) :] != tail:
        ids, flags = ids + tail, np.pad(flags, (0, len(tail)))
    if ids[-1:] != [end]:
        ids, flags = [*ids, end], np.pad(flags, (0, 1))
    flags[: len(head)] = 0
    flags[-1] = 1
    return ids, flags


def _flags_by_offset(offsets: list[tuple[int, int]], spans: list[Span]) -> np.ndarray:
    """A token is a target when it holds a character of a span.

    So does a token that begins in the prompt, such as " four" where the prompt ends with the space: counting
    it teaches the answer's first word, leaving it out would drop that word.
    """
    edges = np.array(offsets, np.int64).reshape(-1, 2)
    starts, ends = edges[:, 0], edges[:, 1]
    flags = np.zeros(len(offsets), np.uint8)
    for start, end in spans:
        # A token without characters (a prefix space of SentencePiece) counts where it stands.
        flags[(starts < end) & ((ends > start) | (starts >= start))] = 1
    return flags


def _flags_by_prefix(tokenizer: Any, row: _Rendered, ids: list[int]) -> np.ndarray:
    """The same without offsets (tokenizers written in Python): count the tokens that a prefix shares."""
    from mlx_empire.data.spans import shared_prefix  # see `encode_rows`

    def shared(end: int) -> int:
        prefix = tokenizer.encode(row.text[:end], add_special_tokens=False)
        return shared_prefix(prefix, ids)

    flags = np.zeros(len(ids), np.uint8)
    for start, end in row.spans or ():
        flags[shared(start) : shared(end)] = 1
    return flags


def _all_targets(where: str, tokens: list[int]) -> Document:
    flags = np.ones(len(tokens), np.uint8)
    flags[:1] = 0
    return Document(where, np.asarray(tokens, np.int32), flags)
