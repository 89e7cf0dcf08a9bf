"""What `inspect` found, as JSON: the terminal and the page are drawn from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mlx_empire.data.rows import packed_rows
from mlx_empire.inspect.findings import DataFinding, SplitRows
from mlx_empire.inspect.look import Inspection
from mlx_empire.inspect.tokens import shown_tokens, states_of
from mlx_empire.inspect.walk import Reading

REFUSED, LEAKED = 64, 65
EDGES = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
MOST_KEYS = 50
Document = dict[str, Any]


def inspection_document(
    found: Inspection, more: Sequence[DataFinding], loss: Mapping[str, Any] | None, rows_per_step: int | None
) -> Document:
    """All that is told but the next command. `more`: findings beside its own; `rows_per_step`: of the recipe."""
    reading, parts = found.reading, [_part(part, found.reading) for part in found.parts]
    findings = [*_empty(found, parts), *found.findings, *more]
    shown, seen = _shown(found), sum(len(part.index) for part in found.parts)
    return {
        "data": str(reading.path),
        "format": reading.format,
        "tokenized": reading.makes_tokens,
        "sequence_length": reading.sequence_length,
        "packing": reading.packing,
        "mask_prompt": reading.mask_prompt,
        "parts": parts,
        "rows_per_step": rows_per_step,
        "steps_per_epoch": parts[0]["trained_rows"] / rows_per_step
        if rows_per_step and reading.makes_tokens
        else None,
        "lengths": _lengths(found.parts[0], reading),
        "begins_with": {
            "tokens": len(found.parts[0].seen.shared),
            "text": found.begins[0],
            "template": found.begins[1],
        },
        "not_read": dict(found.parts[0].seen.unread.most_common(MOST_KEYS)),
        "variety": asdict(found.variety) if found.variety is not None else None,
        "findings": [asdict(one) for one in findings],
        "told": list(found.told),
        "loss": loss,
        "shown": shown,
        "shown_of": seen,
        "exit_code": exit_code(findings),
    }


def exit_code(findings: Sequence[DataFinding]) -> int:
    """64 where a run would refuse the data, 65 where it leaks, else 0."""
    levels = {one.level for one in findings}
    return REFUSED if "refused" in levels else LEAKED if "leak" in levels else 0


def _empty(found: Inspection, parts: Sequence[Document]) -> list[DataFinding]:
    """Splits that a run refuses because nothing of them is learnt."""
    if not found.reading.makes_tokens:
        return []
    length = found.reading.sequence_length
    return [
        DataFinding(
            f"empty_{part['name']}",
            "refused",
            part["rows"],
            f"{part['name']}: none of its {part['rows']:,} rows has anything to learn within {length} positions",
        )
        for part in parts
        if not part["learnt"]
    ]


def _part(part: SplitRows, reading: Reading) -> Document:
    """The figures of a split: `tokens` of all rows, `kept` within the sequence length, `learnt` in an epoch; the rows
    that a run has of them, and their input positions."""
    rows = part.rows
    lengths = part.seen.lengths
    if len(rows) != len(part.seen.rows):
        mask = np.zeros(len(part.seen.rows), bool)
        mask[part.index] = True
        lengths = lengths[np.repeat(mask, part.seen.rows["pieces"])]
    packed = reading.packing and len(lengths)
    size = rows["tokens"] if reading.makes_tokens else rows["characters"]
    learnt, kept = int(rows["learnt"].sum()), int(rows["kept"].sum())
    return {
        "name": part.name,
        "rows": len(rows),
        "characters": int(rows["characters"].sum()),
        "tokens": int(rows["tokens"].sum()),
        "kept": kept,
        "learnt": learnt,
        "learnt_share": learnt / kept if kept else None,
        "trained_rows": len(packed_rows(lengths, reading.sequence_length)[1]) if packed else len(lengths),
        "positions": int((lengths - 1).sum()),
        "median": float(np.median(size)) if len(rows) else 0.0,
        "longest": int(size.max(initial=0)),
        "longest_at": part.where(int(np.argmax(size))) if len(rows) else None,
    }


def _lengths(part: SplitRows, reading: Reading) -> list[Document]:
    """How many rows have how many tokens (characters without a tokenizer); `over`: such rows are cut or split."""
    size = part.rows["tokens" if reading.makes_tokens else "characters"]
    fits = reading.sequence_length + 2  # the first that does not: a row has one token more than positions
    edges = sorted({*EDGES, fits}) if reading.makes_tokens else list(EDGES)
    counts = np.histogram(size, [*edges, 2**40])[0].tolist()
    return [
        {"from": low, "to": high, "rows": count, "over": reading.makes_tokens and low >= fits}
        for low, high, count in zip(edges, [*edges[1:], None], counts, strict=True)
        if count
    ]


def _shown(found: Inspection) -> list[Document]:
    """The rows that are shown whole, in the order of the file, those of the training split first."""
    told = []
    for part in found.parts:
        for row in part.own(part.seen.shown):
            states = states_of(row)
            tokens = shown_tokens(row, found.reading) if found.reading.makes_tokens else []
            told.append(
                {
                    "where": row.where,
                    "part": part.name,
                    "text": "" if tokens else row.text,
                    "tokens": [[text, state] for text, state in tokens],
                    "count": len(states),
                    "learnt": states.count("learnt"),
                    "cut": states.count("cut"),
                }
            )
    return told
