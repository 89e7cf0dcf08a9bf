"""Whatever stands in a row: it is read, refused or dropped with a reason, and nothing breaks."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_empire.data.files import RawRow, locate
from mlx_empire.data.row_format import detect_format
from mlx_empire.errors import UserError
from mlx_empire.inspect.findings import SplitRows, find, variety
from mlx_empire.inspect.layouts import Unusable, layout_of
from mlx_empire.inspect.walk import Reading, Walk

KEYS = ("messages", "conversations", "prompt", "completion", "text", "tokens", "instruction", "input", "output",
        "system", "tools", "role", "content", "from", "value", "tool_calls", "weight", "name", "question")  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers(-3, 900) | st.floats() | st.text(max_size=6)
ROLES = st.sampled_from(["user", "assistant", "gpt", "human", "system", "function_call", "tool", "x", ""])
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": ROLES, "from": ROLES, "content": LEAVES, "value": LEAVES}
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.dictionaries(st.sampled_from(KEYS), st.lists(MESSAGE, max_size=3) | VALUES, max_size=4)


@settings(max_examples=25)
@given(rows=st.lists(ROWS, min_size=1, max_size=4))
@example(rows=[{"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": 3}]}]}])
def test_a_row_is_read_or_refused(tmp_path_factory: Any, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, _ = locate(path)
    try:
        kind = detect_format(next(source.rows()))
    except UserError:
        return
    reading = Reading(path, kind, 8, False, True, 0.0, None, None)
    seen = Walk(reading, shown=2).over(source, lambda count: None)
    assert len(seen.rows) + seen.refused_count == len(rows)
    part = SplitRows("train", seen, np.arange(len(seen.rows)))
    assert all(finding.count for finding in find(reading, [part]))
    variety(part)


@settings(max_examples=50)
@given(first=ROWS, row=ROWS)
def test_a_row_is_converted_or_dropped(first: dict[str, Any], row: dict[str, Any]) -> None:
    try:
        layout = layout_of(RawRow("f:1", first), None)
    except UserError:
        return
    for number, value in enumerate((first, row), 1):
        with suppress(Unusable):
            made = layout.row(RawRow(f"f:{number}", value))
            assert made.keys() <= {"messages", "text", "tools", "functions"}


def test_the_reason_for_a_dropped_row_does_not_say_its_place_again() -> None:
    row = RawRow("f:3", {"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "x"}]})
    with pytest.raises(Unusable, match=r"^message 1 \(user\) has no text"):
        layout_of(row, None).row(row)
