"""A conversion is whole or not there, takes no file's place, and says in one line what it could not read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_empire.data.files import RawRow, Refuse
from mlx_empire.errors import UnreachableError, UserError
from mlx_empire.inspect import convert
from mlx_empire.inspect.convert import converted
from mlx_empire.inspect.layouts import Unusable, layout_of
from mlx_empire.inspect.tables import _stream

PAIR = {"question": "Why?", "answer": "So."}


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def answered(split: str) -> list[tuple[str, ...]]:
    """What is asked and answered in the rows of a split that was written."""
    rows = map(json.loads, Path(f"out/{split}.jsonl").read_text().splitlines())
    return [tuple(one["content"] for one in row["messages"]) for row in rows]


def test_where_one_split_cannot_be_used_none_is_written(
    say: Callable[..., str], write: Callable[..., Path]
) -> None:
    write("set/train.csv", "question,answer", "Why?,So.")
    write("set/valid.csv", "question,answer", "When?,")
    assert "valid: of 1 row none can be used" in say("inspect", "set", "--convert", "out", code=64)
    assert everything(Path("out")) == []


@pytest.mark.parametrize("place", ["", "data/"])
@pytest.mark.parametrize("train", ["train.jsonl", "train.csv", "train-00000-of-00001.csv"])
def test_the_splits_of_a_folder_need_not_be_of_one_kind(
    place: str, train: str, say: Callable[..., str], write: Callable[..., Path]
) -> None:
    """One file beside numbered parts, as folders look to which a person has added something."""
    ask = json.dumps(PAIR) if train.endswith("l") else "question,answer\nWhy?,So."
    write(f"set/{train}", ask)
    for number in (1, 0):
        row = {"question": f"When {number}?", "answer": "Now."}
        write(f"set/{place}validation-0000{number}-of-00002.jsonl", row)
    say("inspect", "set", "--convert", "out")
    assert answered("train") == [("Why?", "So.")]
    assert answered("valid") == [("When 0?", "Now."), ("When 1?", "Now.")]


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("other", ["{}-00000-of-00001.jsonl", "data/{}-00000-of-00001.jsonl", "{}.csv"])
def test_a_split_that_is_there_twice_is_refused(
    split: str, other: str, say: Callable[..., str], write: Callable[..., Path]
) -> None:
    write("set/train.jsonl", PAIR)
    for name in ("{}.jsonl", other):
        write(f"set/{name.format(split)}", PAIR)
    message = say("inspect", "set", "--convert", "out", code=64)
    assert "are the same split; keep one of them" in message
    assert message.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize("links", [True, False], ids=["linked", "without links, as on exFAT"])
def test_a_file_that_came_meanwhile_is_left_and_what_was_placed_before_it_goes(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "valid")}

    def meanwhile(refuse: Refuse) -> Iterator[RawRow]:
        yield RawRow("valid:1", PAIR)
        files["valid"].write_text("the work of years")

    def no_links(*words: Any) -> None:
        raise OSError(convert.NO_LINKS[0], "no links here")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    splits = {"train": lambda refuse: iter([RawRow("train:1", PAIR)]), "valid": meanwhile}
    with pytest.raises(UserError, match=r"^--convert: .*valid\.jsonl: File exists"):
        converted(splits, files, None, lambda what: lambda count: None)
    assert everything(tmp_path) == ["valid.jsonl"]
    assert files["valid"].read_text() == "the work of years"


def test_a_table_without_rows_is_one_line(say: Callable[..., str], write: Callable[..., Path]) -> None:
    write("head.csv", "question,answer")
    write("none.json", "[]")
    for name in ("head.csv", "none.json"):
        assert say("inspect", name, "--convert", "out", code=64) == (
            "mlx_empire: --convert: train: no rows; put at least one there\n"
        )


def test_a_folder_that_cannot_be_made_is_one_line(
    say: Callable[..., str], write: Callable[..., Path]
) -> None:
    write("in.jsonl", PAIR)
    write("file", "x")
    text = say("inspect", "in.jsonl", "--convert", "file/out", code=64)
    assert text.count("\n") == 1
    assert "--convert: file/out" in text


def test_what_cannot_be_read_is_one_line(say: Callable[..., str]) -> None:
    for name, content in (("a.csv", b"question,answer\n\xff,x\n"), ("a.json", b'[{"question": "\xff"}]')):
        Path(name).write_bytes(content)
        text = say("inspect", name, "--convert", "out", code=64)
        assert text.count("\n") == 1
        assert f"{name}: not UTF-8" in text


@pytest.mark.parametrize(
    ("broken", "told", "says"),
    [
        (
            TypeError("Couldn't cast array of type string to int64\nmore"),
            UserError,
            "set/train:3: .*Couldn't cast",
        ),
        (ConnectionError("no route to host"), UnreachableError, "the Hub was not reached"),
        (
            ImportError("To support decoding images, please install 'Pillow'."),
            UserError,
            "set/train:3: .*pip install",
        ),
        (NotImplementedError("Extraction protocol"), UserError, "set/train:3: .*files one by one"),
        (RuntimeError("the codec \x1b[31mstops"), UserError, r"the codec \\x1b\[31mstops"),
    ],
)
def test_a_stream_that_breaks_off_is_one_line(broken: Exception, told: type[Exception], says: str) -> None:
    def split() -> Iterator[dict[str, Any]]:
        yield from (PAIR, PAIR)
        raise broken

    rows = _stream("set/train", split(), ZeroDivisionError)(lambda where, error: None)
    assert [next(rows).where for _ in range(2)] == ["set/train:1", "set/train:2"]
    with pytest.raises(told, match=says) as caught:
        next(rows)
    assert "\n" not in str(caught.value)


def test_a_conversation_in_two_parts_is_one_and_the_second_part_is_learnt() -> None:
    """TRL's: the answers in its prompt are read only; tools stay."""
    asks, says = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    row = {"prompt": [asks, says, asks], "completion": [says], "tools": [{"name": "f"}]}
    layout = layout_of(RawRow("f:1", row), None)
    assert layout.row(RawRow("f:1", row)) == {
        "messages": [asks, says | {"weight": 0}, asks, says],
        "tools": [{"name": "f"}],
    }
    assert row["prompt"][1] == says  # what was read is left as it is


def test_an_answer_that_is_labelled_as_not_wanted_is_dropped() -> None:
    row = {"prompt": "Hi", "completion": "Hello", "label": True}
    layout = layout_of(RawRow("f:1", row), None)
    assert len(layout.row(RawRow("f:1", row))["messages"]) == 2
    with pytest.raises(Unusable, match="'label' is false: this answer is not wanted"):
        layout.row(RawRow("f:2", row | {"label": False}))


def test_an_empty_cell_of_a_table_is_nothing_and_not_nan() -> None:
    """pandas and `datasets` have NaN where a cell is empty."""
    nan = float("nan")
    layout = layout_of(RawRow("f:1", {"instruction": "a", "output": "b"}), None)
    row = layout.row(RawRow("f:1", {"instruction": "Add.", "input": nan, "output": 2.5, "system": nan}))
    assert [one["content"] for one in row["messages"]] == ["Add.", "2.5"]
    with pytest.raises(Unusable, match="'output' is missing"):
        layout.row(RawRow("f:2", {"instruction": "Add.", "output": nan}))


def test_of_two_columns_that_mean_the_same_none_is_lost_in_silence() -> None:
    layout = layout_of(RawRow("f:1", {"instruction": "a", "output": "b"}), None)
    row = {"instruction": "a", "output": "b", "input": "c", "context": "d"}
    with pytest.raises(Unusable, match="'input' and 'context' mean the same, and differ here"):
        layout.row(RawRow("f:1", row))
    for same in (" ", "c"):
        assert layout.row(RawRow("f:1", row | {"context": same}))["messages"][0]["content"] == "a\n\nc"
    twice = layout.row(RawRow("f:1", row | {"context": None, "system": "s", "system_prompt": "s"}))
    assert [one["role"] for one in twice["messages"]] == ["system", "user", "assistant"]
