"""Decides how `data:` in the recipe becomes a training and a validation set; the way into this package."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_empire import progress
from mlx_empire.data.cache import (
    CacheEntry,
    cache_key,
    load_entry,
    make_entry,
    publish_entry,
    tokens_beside,
    tokens_folder,
)
from mlx_empire.data.digests import file_state
from mlx_empire.data.encode import Document, check_tokenizer, encode_rows, load_tokenizer, uses_template
from mlx_empire.data.files import Source, locate
from mlx_empire.data.long_text import rows_in_parts
from mlx_empire.data.order import fixed_permutation
from mlx_empire.data.row_format import detect_format
from mlx_empire.data.rows import Counts, Dataset, Rows, Table, join_rows
from mlx_empire.data.stream import Chosen, Pieces
from mlx_empire.disk import building, free_bytes
from mlx_empire.errors import DoesNotFitError, UserError
from mlx_empire.sizes import amount

SPLITTABLE = ("text", "tokens")
MOST_IN_MEMORY = 2**28  # bytes of data whose tokens are kept there where the cache cannot be written
WARNING = "WARNING"  # how a line of a report begins that asks for action


@dataclass(frozen=True, eq=False)
class Splits:
    """The two sets, what to tell the user about them, and a digest of their contents (equal on every rank and
    after a resume, or the data is not the same)."""

    train: Rows
    valid: Rows | None
    report: list[str]
    digest: str

    @property
    def warnings(self) -> list[str]:
        """The lines of the report that ask for action."""
        return [line for line in self.report if line.startswith(WARNING)]


@dataclass(frozen=True)
class _Settings:
    """Everything but the files' contents that decides what the rows are; part of the cache's key.

    kinds: of each split how its files are read and how many there are, so where training ends and validation begins.
    """

    format: str
    sequence_length: int
    packing: bool
    mask_prompt: bool
    validation_split: float
    vocab_size: int | None
    kinds: tuple[str, ...]


def load_splits(
    *,
    path: str | Path,
    sequence_length: int,
    format: str = "auto",
    packing: bool = False,
    mask_prompt: bool = True,
    validation_split: float | None = None,
    tokenizer_folder: Path | None = None,
    vocab_size: int | None = None,
    thorough: bool = True,
) -> Splits:
    """Read, tokenise and lay out the data at `path` (the recipe's `data` section), or take it from the cache.

    tokenizer_folder: the model's folder, not needed for format `tokens`. vocab_size: rows of the embedding;
    token ids beyond it are refused. validation_split: the fraction of the rows held out where there is no
    validation file. thorough: also large files that have not changed since they were hashed are hashed again. Errors:
    UserError naming file, line and remedy.
    """
    assert sequence_length > 0
    fraction = validation_split or 0.0
    assert 0.0 <= fraction < 1.0
    train, valid = locate(Path(path))
    data_format = _first_format(train) if format == "auto" else format
    if data_format == "tokens":
        tokenizer_folder = None
    kinds = tuple(f"{source.kind} {len(source.files)}" for source in (train, valid) if source)
    settings = _Settings(
        data_format, sequence_length, packing, mask_prompt, 0.0 if valid else fraction, vocab_size, kinds
    )
    entry, note = _from_cache_or_built(train, valid, settings, tokenizer_folder, thorough=thorough)
    sets = {name: Dataset(table, sequence_length, packing) for name, table in entry.tables.items()}
    notes = [*entry.report, note]
    if valid and fraction:
        notes.append(f"without effect here: data.validation_split: {fraction:g} (there is {valid.path})")
    if format == "auto" and data_format in SPLITTABLE and not mask_prompt:
        notes.append(f"without effect here: data.mask_prompt: false (rows of {data_format} have no prompt)")
    return Splits(sets["train"], sets.get("valid"), notes, entry.digest)


def join_splits(each: Mapping[Path, Splits]) -> Splits:
    """The splits of several paths as one, in their order; what is held out is all that any of them holds out."""
    if len(each) == 1:
        return next(iter(each.values()))
    report = [
        f"{WARNING}: {path}: {line.removeprefix(f'{WARNING}: ')}"
        if line.startswith(WARNING)
        else f"{path}: {line}"
        for path, one in each.items()
        for line in one.report
    ]
    held_out = {path: one.valid for path, one in each.items() if one.valid is not None}
    if held_out and len(held_out) < len(each):
        missing = ", ".join(str(path) for path in each if path not in held_out)
        report.append(
            f"nothing is held out of {missing}: evaluations are of {', '.join(map(str, held_out))} alone"
        )
    digest = hashlib.sha256("\n".join(one.digest for one in each.values()).encode()).hexdigest()
    train = join_rows([part for one in each.values() for part in one.train.parts])
    valid = join_rows([part for one in held_out.values() for part in one.parts]) if held_out else None
    return Splits(train, valid, report, digest)


def _from_cache_or_built(
    train: Source,
    valid: Source | None,
    settings: _Settings,
    tokenizer_folder: Path | None,
    *,
    thorough: bool,
) -> tuple[CacheEntry, str]:
    files = [*train.files, *(valid.files if valid else ())]
    before = _states(files)
    folder = tokens_folder() / cache_key(vars(settings), files, tokenizer_folder, thorough=thorough)

    def built(place: Path | None) -> tuple[dict[str, Table], list[str]]:
        made = _build(train, valid, settings, tokenizer_folder, place)
        for file, was, now in zip(files, before, _states(files), strict=True):
            if was != now:  # the key tells of other bytes than were read
                raise UserError(f"{file}: changed while it was read; start again when it stays as it is")
        return made

    entry = load_entry(folder, thorough=thorough)
    if entry is not None:
        return entry, f"tokens read from the cache {folder}"
    try:
        with building(folder, progress.advance) as place:
            entry = load_entry(folder, thorough=thorough)  # another process may have made it meanwhile
            if entry is not None:
                return entry, f"tokens read from the cache {folder}"
            publish_entry(place, folder, *built(place))
        note = f"tokens written to the cache {folder}"
    except OSError as error:
        reason = error.strerror or str(error)
        note = f"tokens not cached: {folder}: {reason}; set MLX_EMPIRE_CACHE to a writable folder"
        _refuse_too_large(files, settings, folder, reason)
    entry = load_entry(folder, thorough=False)
    if entry is None:  # in memory, then
        entry = make_entry(*built(None))
    return entry, note


def _states(files: Sequence[Path]) -> list[list[int]]:
    """Of each file what changes with its content."""
    try:
        return [file_state(file)[:2] for file in files]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}; check data.path") from error


def _refuse_too_large(files: Sequence[Path], settings: _Settings, folder: Path, reason: str) -> None:
    """DoesNotFitError where the tokens of `files`, which the disk has no room for, would not fit in memory either."""
    size = sum(file.stat().st_size for file in files)
    if size > MOST_IN_MEMORY:
        copied = settings.packing or settings.validation_split > 0
        raise DoesNotFitError(
            f"{folder.parent}: {reason}: the tokens of {amount(size)} of data take up to "
            f"{amount(tokens_beside(size, copied=copied))} there while they are written, and "
            f"{amount(free_bytes(folder))} is free; free some room, or set MLX_EMPIRE_CACHE to a folder with more"
        )


def _first_format(source: Source) -> str:
    first = next(rows_in_parts(source), None)
    if first is None:
        raise UserError(f"{source.path}: no rows; put at least one there")
    return detect_format(first)


def _build(
    train: Source,
    valid: Source | None,
    settings: _Settings,
    tokenizer_folder: Path | None,
    place: Path | None,
) -> tuple[dict[str, Table], list[str]]:
    """The tables by split, their large arrays as files in `place` (None: in memory), and the sentences about them."""
    tokenizer, notes = None, []
    if settings.format != "tokens":
        tokenizer = load_tokenizer(tokenizer_folder)
        check_tokenizer(settings.format, tokenizer, tokenizer_folder)
        if settings.format == "completions" and not uses_template(settings.format, tokenizer):
            notes = ["the tokenizer has no chat template: prompt and completion are joined as they stand"]
    from mlx_empire.data.chat import Remarks  # only where rows are read: see `encode_rows`

    remarks, tables = Remarks(), {}
    splittable = settings.format in SPLITTABLE
    with ExitStack() as stack:

        def read(source: Source, name: str) -> Pieces:
            documents = encode_rows(
                rows_in_parts(source),
                settings.format,
                tokenizer,
                settings.mask_prompt,
                settings.vocab_size,
                remarks,
                whole=False,
            )
            found = stack.enter_context(
                closing(Pieces(place, name, settings.sequence_length, splittable=splittable))
            )
            for document in documents:
                found.add(document)
            return found

        pieces = read(train, "train")
        held_out = read(valid, "valid") if valid else None
        for name, own, chosen, source in _chosen(pieces, held_out, train, valid, settings):
            made = own.table(name, chosen, packing=settings.packing)
            if made is None:
                raise UserError(
                    f"{source.path}: the {name} split is empty: {_why_empty(chosen.counts, settings)}"
                )
            tables[name], targets = made
            notes.append(_sentence(name, tables[name], targets, chosen.counts, settings))
    return tables, [*notes, *remarks.sentences(tokenizer)]


def _chosen(
    pieces: Pieces, held_out: Pieces | None, train: Source, valid: Source | None, settings: _Settings
) -> Iterator[tuple[str, Pieces, Chosen, Source]]:
    """Of each split its name, where its pieces are, which of them it has and the source to blame. A fraction of the
    documents is held out, or the end of a lone one that may be split."""
    if settings.validation_split <= 0:
        yield "train", pieces, pieces.of_documents(np.ones(len(pieces), bool)), train
        if held_out is not None and valid is not None:
            yield "valid", held_out, held_out.of_documents(np.ones(len(held_out), bool)), valid
        return
    fraction = settings.validation_split
    if pieces.lone_tokens is not None:
        edge = _edge(pieces.lone_tokens, settings.sequence_length, fraction)
        if edge > 0:
            first, last = pieces.of_lone(edge)
            yield "train", pieces, first, train
            yield "valid", pieces, last, train
            return
    refuse_too_few(len(pieces), fraction, train.path)
    held = np.zeros(len(pieces), bool)
    held[held_out_rows(len(pieces), fraction)] = True
    yield "train", pieces, pieces.of_documents(~held), train
    yield "valid", pieces, pieces.of_documents(held), train


def held_out_rows(count: int, fraction: float) -> list[int]:
    """Which of `count` rows are held out: a fixed shuffle chooses, which run.seed must not move."""
    chosen: list[int] = fixed_permutation(count)[: _share(count, fraction)].tolist()
    return chosen


def refuse_too_few(count: int, fraction: float, path: Path) -> None:
    """UserError where of `count` rows at `path` none would be left to learn from."""
    if _share(count, fraction) >= count:
        raise UserError(
            f"{path}: {count} row(s) are too few for data.validation_split {fraction:g}; add rows or set it to 0"
        )


def end_held_out(whole: Document, length: int, fraction: float) -> tuple[Document, Document] | None:
    """A lone document that may be split (a book in one .txt file) without its end, and that, cut where two rows meet;
    None where it is too short."""
    edge = _edge(len(whole.tokens), length, fraction)
    if edge <= 0:
        return None
    ends = (slice(edge + 1), slice(edge, None))
    first, last = (Document(whole.where, whole.tokens[e], whole.counted[e]) for e in ends)
    return first, last


def _edge(tokens: int, length: int, fraction: float) -> int:
    """At which token the end begins that is held out of a lone document."""
    pieces = -(-(tokens - 1) // length)
    return (pieces - _share(pieces, fraction)) * length


def _share(count: int, fraction: float) -> int:
    return max(1, round(count * fraction))


def _why_empty(counts: Counts, settings: _Settings) -> str:
    if counts.documents == 0:
        return "it has no rows; add some or remove the file"
    return (
        f"none of its {counts.documents} rows has a target within {settings.sequence_length} positions; "
        "raise data.sequence_length or set data.mask_prompt: false"
    )


def _sentence(name: str, table: Table, targets: int, counts: Counts, settings: _Settings) -> str:
    dataset = Dataset(table, settings.sequence_length, settings.packing)
    text = (
        f"{name}: {counts.documents} {settings.format} rows read, {len(dataset)} rows of up to "
        f"{settings.sequence_length} positions, {targets} targets"
    )
    if settings.packing:
        full = dataset.positions_per_epoch / (len(dataset) * settings.sequence_length)
        text += f", packed {full:.1%} full"
    if counts.cut:
        text += f"; {counts.cut} cut at {settings.sequence_length} positions"
    if counts.dropped:
        text += f"; {counts.dropped} dropped for want of a target"
    return text
