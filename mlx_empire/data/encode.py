"""Decides which token ids a row becomes and which of them are training targets (BOS, EOS, prompt masks)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mlx_empire import progress
from mlx_empire.data.files import RawRow
from mlx_empire.data.long_text import Offsets, tokens_in_parts
from mlx_empire.data.row_format import check_row
from mlx_empire.data.targets import begun, ended, flags_by_offset, flags_by_prefix, uncount_bos
from mlx_empire.errors import UserError
from mlx_empire.recipe.text import words_of

if TYPE_CHECKING:
    from mlx_empire.data.chat import ChatReader, Remarks
    from mlx_empire.data.messages import Messages
    from mlx_empire.data.spans import Span

BATCH = 256  # rows tokenised together, at most: the tokenizer's own threads share them
CHARACTERS = 2**20  # a batch ends with the row that reaches so many; a text with more comes in parts


@dataclass(frozen=True)
class Document:
    """One row's tokens (n,) int32 and the uint8 flags (n,) of those that count as targets; `more`: the next document
    is this row's next part."""

    where: str
    tokens: np.ndarray
    counted: np.ndarray
    more: bool = False


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
    *,
    whole: bool = True,
) -> Iterator[Document]:
    """Turn raw rows into documents, in order. `tokenizer` may be None for format `tokens`. `remarks` collects what
    the user should be told about conversations. whole: a row is one document, however long its text.

    Errors: UserError naming file and line for rows of another format, broken rows and ids outside the
    vocabulary.
    """
    long: list[Document] = []
    for document in _documents(iter(rows), data_format, tokenizer, mask_prompt, remarks):
        largest = int(document.tokens.max(initial=-1))
        if vocab_size is not None and largest >= vocab_size:
            raise UserError(
                f"{document.where}: token id {largest} is outside the model's vocabulary of "
                f"{vocab_size}; use the tokenizer and the tokens that belong to model.path"
            )
        if not whole or not (document.more or long):
            yield document
            continue
        long.append(document)
        if not document.more:
            tokens, counted = (np.concatenate([getattr(d, n) for d in long]) for n in ("tokens", "counted"))
            yield Document(document.where, tokens, counted)
            long.clear()


def _documents(
    rows: Iterator[RawRow], data_format: str, tokenizer: Any, mask_prompt: bool, remarks: Remarks | None
) -> Iterator[Document]:
    """As `encode_rows`, whatever the vocabulary; long texts in parts."""
    # A run whose tokens are in the cache renders nothing.
    from mlx_empire.data.chat import ChatReader

    if data_format == "tokens":
        for number, row in enumerate(rows):
            if number % BATCH == 0:
                progress.advance()
            check_row(row, data_format)
            yield _all_targets(row.where, row.value["tokens"])
        return
    reader = ChatReader(tokenizer, remarks)
    waiting: list[_Rendered] = []
    characters = 0
    with _Ahead(tokenizer, data_format) as ahead:
        for row in rows:
            check_row(row, data_format)
            if data_format == "text" and (row.more or len(row.value["text"]) > CHARACTERS):
                yield from ahead.documents(waiting)
                yield from ahead.documents([])
                waiting, characters = [], 0
                yield from _encode_long(row.where, _texts(row, rows), tokenizer)
                continue
            waiting.append(_render(row, data_format, tokenizer, reader, mask_prompt))
            characters += len(waiting[-1].text)
            if len(waiting) == BATCH or characters >= CHARACTERS:
                progress.advance()
                yield from ahead.documents(waiting)
                waiting, characters = [], 0
        yield from ahead.documents(waiting)
        yield from ahead.documents([])


def _texts(row: RawRow, following: Iterator[RawRow]) -> Iterator[str]:
    """The text of a row, part by part; its other parts come first in what follows."""
    yield row.value["text"]
    while row.more:
        row = next(following)
        yield row.value["text"]


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


class _Ahead:
    """Tokenises a batch in a thread of its own while the next one is read and the one before is laid out."""

    def __init__(self, tokenizer: Any, data_format: str) -> None:
        self._tokenizer, self._template = tokenizer, uses_template(data_format, tokenizer)
        # A template writes its own special tokens; elsewhere each text gets those that it lacks of the tokenizer's.
        self._around: tuple[list[int], list[int]] | None = None
        self._thread = ThreadPoolExecutor(1, "tokens")
        self._begun: tuple[list[_Rendered], Future[Any]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def documents(self, rendered: list[_Rendered]) -> Iterator[Document]:
        """Begin with these rows; the documents of those that were begun before."""
        for row in rendered:
            _refuse_surrogates(row.where, row.text)
        before, self._begun = self._begun, None
        if rendered:
            masked = any(row.spans is not None for row in rendered) and self._tokenizer.is_fast
            texts = [row.text for row in rendered]
            if not self._template and self._around is None:  # before the thread has the tokenizer
                self._around = _added(self._tokenizer)
            self._begun = rendered, self._thread.submit(_encoded, self._tokenizer, texts, offsets=masked)
        if before is not None:
            rows, encoded = before[0], before[1].result()
            offsets = encoded["offset_mapping"] if "offset_mapping" in encoded else [None] * len(rows)
            for row, ids, places in zip(rows, encoded["input_ids"], offsets, strict=True):
                yield self._document(row, ids, places)

    def _document(self, row: _Rendered, ids: list[int], offsets: Offsets | None) -> Document:
        tokenizer, tokens = self._tokenizer, np.array(ids, np.int32)
        if row.spans is None:
            flags = np.ones(len(ids), np.uint8)
        elif offsets is not None:
            flags = flags_by_offset(offsets, row.spans)
        else:
            flags = flags_by_prefix(tokenizer, row.text, row.spans, ids)
        if not self._template and row.text:
            assert self._around is not None
            head, tail = self._around
            tokens, flags = begun(tokens, flags, head)
            tokens, flags = ended(tokens, flags, tail, tokenizer.eos_token_id)
        uncount_bos(tokens, flags, tokenizer)
        flags[:1] = 0
        return Document(row.where, tokens, flags)


def _encode_long(where: str, parts: Iterator[str], tokenizer: Any) -> Iterator[Document]:
    """A text as documents that follow one another: at most some windows of it are in memory. Tokenizers written in
    Python, which say not where a token begins, get it whole."""

    def sound(texts: Iterator[str]) -> Iterator[str]:
        for text in texts:
            _refuse_surrogates(where, text)
            yield text

    def encode(texts: list[str]) -> Iterator[tuple[list[int], Offsets]]:
        encoded = _encoded(tokenizer, texts, offsets=True)
        return zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)

    if not tokenizer.is_fast:
        with _Ahead(tokenizer, "text") as whole:
            yield from whole.documents([_Rendered(where, "".join(parts), None)])
            yield from whole.documents([])
        return
    head, tail = _added(tokenizer)
    found = tokens_in_parts(sound(parts), encode)
    part, first = next(found, None), True
    while part is not None:
        tokens, flags, following = part, np.ones(len(part), np.uint8), next(found, None)
        if first:
            tokens, flags = begun(tokens, flags, head)
        if following is None:
            tokens, flags = ended(tokens, flags, tail, tokenizer.eos_token_id)
        uncount_bos(tokens, flags, tokenizer)
        flags[: int(first)] = 0
        yield Document(where, tokens, flags, more=following is not None)
        part, first = following, False


def _encoded(tokenizer: Any, texts: list[str], *, offsets: bool) -> Any:
    """As transformers says it, without special tokens: mlx-lm's wrapper has no batches and no offsets, hence the
    tokenizer inside it."""
    return tokenizer._tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=offsets,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )


def _refuse_surrogates(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: a lone surrogate (\\ud800-\\udfff) is not text; remove it") from error


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


def _all_targets(where: str, tokens: list[int]) -> Document:
    flags = np.ones(len(tokens), np.uint8)
    flags[:1] = 0
    return Document(where, np.asarray(tokens, np.int32), flags)
