"""Which files are read, and how a line that cannot be read is named."""

import builtins
import sys
from pathlib import Path

import pytest

from mlx_empire.data.files import RawRow, locate
from mlx_empire.data.row_format import detect_format
from mlx_empire.data.splits import load_splits
from mlx_empire.errors import UserError

TOKENS = {"tokens": [1, 2, 3]}
PAIR = {"prompt": "once", "completion": "upon a time"}


def rows_of(path: Path) -> list[dict]:
    return [row.value for row in locate(path)[0].rows()]


def test_a_folder_gives_train_and_valid(write, tmp_path):
    write("set/train.jsonl", TOKENS)
    write("set/valid.jsonl", {"tokens": [4, 5]})
    write("set/test.jsonl", {"tokens": [6, 7]})
    train, valid = locate(tmp_path / "set")
    assert [row.value for row in train.rows()] == [TOKENS]
    assert valid is not None
    assert [row.value for row in valid.rows()] == [{"tokens": [4, 5]}]


def test_one_file_has_no_validation(write):
    assert locate(write("some.jsonl", TOKENS))[1] is None


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n   \r\n{"text": "b"}\r\n')
    rows = list(locate(path)[0].rows())
    assert [(row.where, row.value["text"]) for row in rows] == [(f"{path}:1", "a"), (f"{path}:4", "b")]


def test_text_files_are_one_document_each_in_the_order_of_their_names(tmp_path):
    for name, text in (("b.txt", "second\n\nwith lines"), ("a.txt", "first"), ("valid.txt", "held out")):
        (tmp_path / name).write_text(text)
    train, valid = locate(tmp_path)
    assert [row.value["text"] for row in train.rows()] == ["first", "second\n\nwith lines"]
    assert valid is not None
    assert [row.value["text"] for row in valid.rows()] == ["held out"]


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b'{"text": "a"}\n{"text": \n', 2, "not JSON"),
        (b'{"text": "a"}\n\n["a"]\n', 3, "a JSON list, not an object"),
        (b'{"text": "a"}\n3\n', 2, "not an object"),
        (b'{"text": "\xff\xfe"}\n', 1, "not UTF-8"),
        (b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", 2, "not usable JSON"),
        (b'{"tokens": [' + b"1" * 5000 + b"]}\n", 1, "not usable JSON"),
        (b'{"text": 3}\n', 1, "must be a string"),
        (b'{"other": "a"}\n', 1, "no known keys (it has other)"),
        (b'{"\\u001b[2Jother": "a"}\n', 1, r"no known keys (it has \x1b[2Jother)"),
        (b'{"text": "a"}\n{"prompt": "a", "completion": "b"}\n', 2, "no 'text' in a file of format text"),
        (b'{"text": "a", "tokens": [1]}\n', 1, "text or tokens; say which with data.format"),
        (
            b'{"instruction": "a", "output": "b", "text": "a b"}\n',
            1,
            "writes it as messages; or say data.format",
        ),
        (b'{"conversations": [], "text": "a b"}\n', 1, "writes it as messages; or say data.format: text"),
        (
            b'{"prompt": "a", "completion": "b", "label": false}\n',
            1,
            "'label' says whether the completion is wanted",
        ),
        (b'{"question": "a", "answer": "b"}\n', 1, "--convert OUT` makes such rows"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", 1, "git lfs pull"),
        (b'{"text": "\\ud800"}\n', 1, "lone surrogate"),
        (b'{"tokens": [1, -1]}\n', 1, "token 1 is -1"),
        (b'{"tokens": [1, true]}\n', 1, "token 1 is True"),
        (b'{"tokens": [1, 2.0]}\n', 1, "token 1 is 2.0"),
        (b'{"tokens": [1, 4294967296]}\n', 1, "token 1 is 4294967296"),
        (b'{"tokens": "1 2"}\n', 1, "must be a list of integers"),
        (b'{"tokens": [1, 2]}\n{"tokens": [1, 512]}\n', 2, "token id 512 is outside"),
        (b'{"prompt": "a", "completion": ["b"]}\n', 1, "'completion' is a list"),
        (b'{"prompt": [{}], "completion": [{}]}\n', 1, "--convert OUT` joins them"),
        (b'{"tokens": [1, 2], "labels": [-100, 2]}\n', 1, "'labels' says which positions are learnt"),
        (b'{"messages": [], "loss_mask": [1]}\n', 1, "'loss_mask' says which positions are learnt"),
        (b'{"messages": []}\n', 1, "'messages' is not a list"),
        (b'{"messages": {"role": ["user"]}}\n', 1, "'messages' is not a list"),
        (b'{"messages": ["a"]}\n', 1, "message 1 is a str"),
        (b'{"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}\n', 1, "message 2 has no role"),
        (b'{"messages": [{"role": "user"}]}\n', 1, "message 1 (user) has no text"),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": "x"}\n', 1, "'tools' must be a list"),
    ],
)
def test_bad_lines_are_named_by_file_and_line_in_one_line(content, line, says, tmp_path, tokenizer_folder):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_splits(path=path, sequence_length=8, tokenizer_folder=tokenizer_folder, vocab_size=512)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ")
    assert says in message
    assert "; " in message, "every message ends with a remedy"
    assert message.isprintable(), "one line, and nothing that a terminal obeys"


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"instruction": "a", "output": "b", "text": "once upon"}, "text"),
        ({**PAIR, "label": False}, "completions"),
    ],
)
def test_what_two_things_could_be_meant_by_is_learnt_where_a_person_says_which(
    row, format, write, tokenizer_folder
):
    path = write("a.jsonl", row, row)
    splits = load_splits(path=path, sequence_length=16, format=format, tokenizer_folder=tokenizer_folder)
    assert len(splits.train) == 2


def test_a_class_beside_a_completion_is_no_preference(write):
    assert detect_format(next(locate(write("a.jsonl", {**PAIR, "label": 1}))[0].rows())) == "completions"


def test_a_column_of_a_table_in_which_a_row_has_nothing_says_nothing_of_its_format():
    """Parquet and datasets give every row all columns, with None where it has no value."""
    row = RawRow("a.parquet:1", {"text": "hi", "instruction": None, "conversations": None, "messages": None})
    assert detect_format(row) == "text"
    with pytest.raises(UserError, match="no known keys"):
        detect_format(RawRow("a.parquet:1", {"body": "hi", "instruction": None}))


@pytest.mark.parametrize("place", ["", "data/"])
def test_a_split_in_numbered_parts_as_the_hub_has_them_is_read_in_their_order(place, write, tmp_path):
    for number in (2, 0, 1):
        write(
            f"{place}train-0000{number}-of-00003-0123456789abcdef.jsonl",
            {"text": f"{number}a"},
            {"text": "b"},
        )
    write(f"{place}validation-00000-of-00001.jsonl", {"text": "held out"})
    write(f"{place}test-00000-of-00001.jsonl", {"text": "never read"})
    train, valid = locate(tmp_path)
    assert [row.value["text"] for row in train.rows()] == ["0a", "b", "1a", "b", "2a", "b"]
    assert valid is not None
    assert [row.value["text"] for row in valid.rows()] == ["held out"]


@pytest.mark.parametrize("numbers", [(0,), (1, 2), (0, 2)])
def test_a_split_of_which_a_part_is_missing_is_refused(numbers, write, tmp_path):
    for number in numbers:
        write(f"train-0000{number}-of-00003.jsonl", {"text": "a"})
    with pytest.raises(UserError, match="of the 3 parts"):
        locate(tmp_path)


def test_a_text_file_that_is_not_utf8_is_named_with_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\xff\n")
    with pytest.raises(UserError, match=r"a\.txt:3: not UTF-8"):
        rows_of(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("names", "path", "says"),
    [
        ([], "nothing", "no such file or folder"),
        (["set/valid.jsonl"], "set", "nothing to train on"),
        (["set/train.jsonl", "set/train.txt"], "set", "train.jsonl and train.txt are the same split"),
        (["a.csv"], "a.csv", "unknown suffix '.csv'"),
        (["set/dataset_dict.json"], "set", "no split saved there"),
    ],
)
def test_paths_that_cannot_be_used(names, path, says, write, tmp_path):
    for name in names:
        write(name, TOKENS)
    with pytest.raises(UserError, match=says):
        locate(tmp_path / path)


def test_without_datasets_the_message_says_what_to_install(write, tmp_path, monkeypatch):
    write("set/state.json", {})
    write("set.parquet")
    real = builtins.__import__

    def no_extras(name, *args, **kwargs):
        if name.split(".")[0] in ("datasets", "pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_extras)
    for name in [name for name in sys.modules if name.split(".")[0] in ("datasets", "pyarrow")]:
        monkeypatch.delitem(sys.modules, name)
    for path in ("set", "set.parquet"):
        with pytest.raises(UserError, match="-m pip install datasets, or save"):
            rows_of(tmp_path / path)


def test_datasets_folders_and_parquet_hold_the_same_rows_as_json_lines(fixtures, tmp_path, tokenizer_folder):
    datasets = pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    datasets.disable_progress_bars()
    rows = rows_of(fixtures / "wordnet")
    train = datasets.Dataset.from_list(rows)
    both = datasets.DatasetDict({"train": train, "validation": train.select([3, 1, 2])})
    both.save_to_disk(tmp_path / "both")
    train.select(range(len(rows))).save_to_disk(tmp_path / "one")
    train.to_parquet(tmp_path / "one.parquet")

    def load(path):
        return load_splits(path=path, sequence_length=64, tokenizer_folder=tokenizer_folder)

    (tmp_path / "train.jsonl").write_bytes((fixtures / "wordnet" / "train.jsonl").read_bytes())
    expected = load(tmp_path / "train.jsonl").digest
    assert load(tmp_path / "one").digest == expected
    assert load(tmp_path / "one.parquet").digest == expected
    assert rows_of(tmp_path / "both") == rows
    valid = locate(tmp_path / "both")[1]
    assert valid is not None
    assert [row.value for row in valid.rows()] == [rows[3], rows[1], rows[2]]


def test_a_damaged_datasets_folder_is_a_user_error(write, tmp_path):
    pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    write("set/state.json", {})
    with pytest.raises(UserError, match="not a readable datasets folder"):
        rows_of(tmp_path / "set")
