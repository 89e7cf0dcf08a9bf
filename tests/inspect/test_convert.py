"""`mlx-empire inspect DATA --convert OUT`: other tools' rows beside what a person would write, and what is lost."""

from __future__ import annotations

import csv
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.rows import MODEL, chat

CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'
CALLED = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def turns(*said: str, system: str | None = None) -> list[dict[str, Any]]:
    """Messages of user and assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [
        {"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(said)
    ]


def said_by(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    """Messages as ShareGPT has them."""
    return [{"from": role, "value": text} for role, text in pairs]


# A row of another tool, and ours.
ALPACA = [
    (
        {"instruction": "Say hi.", "input": "", "output": "Hi!", "text": "all of it"},
        {"messages": turns("Say hi.", "Hi!")},
    ),
    ({"instruction": "Add.", "input": "1+1", "output": "2"}, {"messages": turns("Add.\n\n1+1", "2")}),
    (
        {"instruction": "Add.", "output": "3", "system": "Be short."},
        {"messages": turns("Add.", "3", system="Be short.")},
    ),
]
DOLLY = [
    (
        {"instruction": "Who?", "context": "", "response": "Me.", "category": "qa"},
        {"messages": turns("Who?", "Me.")},
    ),
    (
        {"instruction": "Who?", "context": "I am.", "response": "You."},
        {"messages": turns("Who?\n\nI am.", "You.")},
    ),
]
SHAREGPT = [
    (
        {
            "id": "1",
            "conversations": said_by(("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "Bye!")),
        },
        {"messages": turns("Hi", "Hello", "Bye", "Bye!")},
    ),
    (
        {"conversations": said_by(("user", "Hi"), ("chatgpt", "Hello")), "system": "Be kind."},
        {"messages": turns("Hi", "Hello", system="Be kind.")},
    ),
    (
        {
            "conversations": said_by(
                ("human", "How warm?"), ("function_call", CALL), ("observation", "30"), ("gpt", "Warm.")
            ),
            "tools": '[{"name": "weather"}]',
        },
        {
            "messages": [
                {"role": "user", "content": "How warm?"},
                {"role": "assistant", "content": None, "tool_calls": [CALLED]},
                {"role": "observation", "content": "30"},
                {"role": "assistant", "content": "Warm."},
            ],
            "tools": '[{"name": "weather"}]',
        },
    ),
]
MESSAGES = [
    ({"messages": said_by(("human", "Hi"), ("gpt", "Hello"))}, {"messages": turns("Hi", "Hello")}),
    ({"messages": turns("Hi", "Hello"), "score": 3}, {"messages": turns("Hi", "Hello")}),
    ({"messages": json.dumps(turns("Hi", "Hello"))}, {"messages": turns("Hi", "Hello")}),
]
PAIRS = [({"question": "Why?", "answer": "So.", "id": 1}, {"messages": turns("Why?", "So.")})]
TEXTS = [({"text": "Once upon a time.", "meta": {}}, {"text": "Once upon a time."})]
LAYOUTS = {
    "Alpaca": ("Alpaca", ALPACA),
    "Dolly": ("Alpaca", DOLLY),
    "ShareGPT": ("ShareGPT", SHAREGPT),
    "messages": ("conversations", MESSAGES),
    "pairs": ("prompt and answer", PAIRS),
    "texts": ("texts", TEXTS),
}


def rows_of(path: str | Path) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("array", [False, True], ids=["lines", "array"])
def test_rows_become_ours_and_training_takes_them(
    layout: str, array: bool, found: Callable[..., Any], write: Callable[..., Path]
) -> None:
    title, pairs = LAYOUTS[layout]
    theirs = [row for row, _ in pairs]
    name = write("in.json", json.dumps(theirs, indent=2)) if array else write("in.jsonl", *theirs)
    document = found(name, "--convert", "out")
    assert rows_of("out/train.jsonl") == [ours for _, ours in pairs]
    (part,) = document["parts"]
    assert (part["layout"], part["written"], part["dropped"]) == (title, len(pairs), 0)
    lost = {key for row in theirs for key in row} & {"text", "category", "id", "score", "meta"} - set(
        pairs[0][1]
    )
    assert set(part["not_carried"]) == {key for key in lost if any(row.get(key) for row in theirs)}
    assert found("out")["exit_code"] == 0


def test_what_a_run_refuses_names_the_command_that_makes_it_trainable(
    say: Callable[..., str], write: Callable[..., Path]
) -> None:
    """Each message is followed to the letter."""
    for array in ("alpaca.json", "array.jsonl"):
        write(array, json.dumps([row for row, _ in ALPACA]))
    write("alpaca.jsonl", *(row for row, _ in ALPACA[1:]))
    write("share it.jsonl", *(row for row, _ in SHAREGPT[:2]))
    write("from.jsonl", MESSAGES[0][0])
    write("a.csv", "question,answer", "Why?,So.")
    write("set/train.csv", "question,answer", "Why?,So.")
    for name in (
        "alpaca.json", "array.jsonl", "alpaca.jsonl", "share it.jsonl", "from.jsonl", "a.csv", "set",
    ):  # fmt: skip
        model = ["--model", MODEL] if name == "from.jsonl" else []
        message = say("inspect", name, *model, code=64)
        quoted = f"'{name}'" if " " in name else name
        assert f"mlx-empire inspect {quoted} --convert OUT" in message
        out = f"{name}.out"
        told = say("inspect", name, "--convert", out)
        assert told.splitlines()[-1].strip().startswith("mlx-empire inspect ")
        say("inspect", out)


def test_a_table_is_read_as_python_reads_it(say: Callable[..., str], found: Callable[..., Any]) -> None:
    """Cells with commas, quotation marks and line breaks; tables with tabs or semicolons, and a mark of UTF-8 before
    them; an empty first cell of a column; lines without cells. A row's place is the line on which it begins."""
    cells = [
        ("Say, hi", "", 'He said "hi"\nand left'),
        ("Add", "1,1", "2"),
        (),
        ("Lost", "", "\r\n"),
        ("", "", "x"),
    ]
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t"), ("semicolons.csv", ";")):
        with Path(name).open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([("instruction", "input", "output"), *cells])
        (part,) = found(name, "--convert", f"{name}.jsonl")["parts"]
        assert rows_of(f"{name}.jsonl") == [
            {"messages": turns("Say, hi", 'He said "hi"\nand left')},
            {"messages": turns("Add\n\n1,1", "2")},
        ]
        assert part["dropped_at"] == [
            {"where": f"{name}:6", "says": "'output' is empty"},
            {"where": f"{name}:8", "says": "'instruction' is empty"},
        ]


def test_columns_that_nobody_knows_are_named_by_the_person(
    say: Callable[..., str], write: Callable[..., Path]
) -> None:
    write("a.csv", "id,English,French", "1,cat,chat")
    message = say("inspect", "a.csv", "--convert", "out", code=64)
    assert message.count("\n") == 1
    assert "'id', 'English', 'French'" in message
    assert "--columns PROMPT,ANSWER" in message
    assert not Path("out").exists() or not list(Path("out").iterdir())
    say("inspect", "a.csv", "--convert", "out", "--columns", "English, French")
    assert rows_of("out/train.jsonl") == [{"messages": turns("cat", "chat")}]
    assert "no column 'German'" in say(
        "inspect", "a.csv", "--convert", "b", "--columns", "English,German", code=64
    )


def test_rows_that_training_would_refuse_are_dropped_by_line_with_the_reason(
    say: Callable[..., str], found: Callable[..., Any], write: Callable[..., Path]
) -> None:
    good = {"conversations": said_by(("human", "Hi"), ("gpt", "Hello"))}
    write(
        "in.jsonl",
        good,
        "{broken",
        {"conversations": []},
        {"conversations": said_by(("human", "Hi"))},
        {"conversations": said_by(("human", "Hi"), ("function_call", "weather in Rome"))},
        {"conversations": [{"from": "human", "value": 3}]},
        {"conversations": [7]},
        {"else": 1},
        good,
    )
    (part,) = found("in.jsonl", "--convert", "out.jsonl")["parts"]
    assert part["written"] == len(rows_of("out.jsonl")) == 2
    expected = {
        2: "not JSON",
        3: "not a list of one message or more",
        4: "no message of the assistant",
        5: "message 2: the call of a function is not JSON",
        6: "message 1: 'from' and 'value' must be texts",
        7: "message 1 is a int",
        8: "'conversations' is not a list",
    }
    assert [place["where"] for place in part["dropped_at"]] == [f"in.jsonl:{n}" for n in expected]
    for place, words in zip(part["dropped_at"], expected.values(), strict=True):
        assert words in place["says"]
    text = say("inspect", "in.jsonl", "--convert", "again.jsonl")
    assert "dropped: 7 rows" in text
    assert "in.jsonl:4: no message of the assistant" in text


def test_nothing_is_replaced_and_nothing_half_written_stays(
    say: Callable[..., str], write: Callable[..., Path]
) -> None:
    write("in.jsonl", ALPACA[0][0])
    write("bad.json", '[{"instruction": "a", "output": "b"},', "{broken}]")
    write("none.jsonl", {"instruction": "a", "output": ""})
    write("out/train.jsonl", "the work of years")
    assert "is there already" in say("inspect", "in.jsonl", "--convert", "out", code=64)
    assert Path("out/train.jsonl").read_text() == "the work of years\n"
    assert "bad.json:2: not JSON" in say("inspect", "bad.json", "--convert", "new", code=64)
    assert "of 1 row none can be used (the first, none.jsonl:1: 'output' is empty)" in say(
        "inspect", "none.jsonl", "--convert", "new", code=64
    )
    assert list(Path("new").iterdir()) == []


def test_a_folder_keeps_its_validation_rows_apart(
    say: Callable[..., str], write: Callable[..., Path]
) -> None:
    write("set/train.csv", "question,answer", "Why?,So.")
    write("set/validation.csv", "question,answer", "When?,Now.")
    assert "name a folder" in say("inspect", "set", "--convert", "out.jsonl", code=64)
    say("inspect", "set", "--convert", "out")
    assert rows_of("out/train.jsonl") == [{"messages": turns("Why?", "So.")}]
    assert rows_of("out/valid.jsonl") == [{"messages": turns("When?", "Now.")}]


def test_a_data_set_of_the_hub_is_streamed_by_datasets(
    say: Callable[..., str], found: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` itself is asked in test_as_datasets.py; here its answers and errors are made up."""
    asked = {}
    parquet, install = "try {}@refs/convert/parquet", "-m pip install"
    refused = {
        "with/script": (
            RuntimeError("Dataset scripts are no longer supported, but found script.py"),
            parquet,
        ),
        "with/protocol": (NotImplementedError("Extraction protocol for TAR archives"), parquet),
        "with/images": (ImportError("To support decoding images, please install 'Pillow'."), install),
    }

    def load_dataset(name: str, subset: str | None, revision: str | None, streaming: bool) -> Any:
        asked.update(name=name, subset=subset, revision=revision, streaming=streaming)
        if name == "no/where":
            raise FileNotFoundError("Dataset 'no/where' doesn't exist on the Hub")
        if name == "cut/off":
            raise ConnectionError("no route to host")
        if name in refused:
            raise refused[name][0]
        if subset is None:
            raise ValueError("Config name is missing.\nPlease pick one among ['main', 'socratic']")
        return {"train": [PAIRS[0][0]] * 2, "validation": [PAIRS[0][0]], "test": []}

    errors = types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
    module = types.SimpleNamespace(load_dataset=load_dataset, exceptions=errors)
    monkeypatch.setitem(sys.modules, "datasets", module)  # type: ignore[arg-type]
    document = found("openai/gsm8k@v1", "--subset", "main", "--convert", "out")
    assert asked == {"name": "openai/gsm8k", "subset": "main", "revision": "v1", "streaming": True}
    assert document["left_out"] == ["test"]
    assert (len(rows_of("out/train.jsonl")), len(rows_of("out/valid.jsonl"))) == (2, 1)
    assert "--subset NAME says which" in say("inspect", "openai/gsm8k", "--convert", "b", code=64)
    assert "neither a file here nor a data set" in say("inspect", "no/where", "--convert", "b", code=64)
    assert "the Hub was not reached (no route to host)" in say(
        "inspect", "cut/off", "--convert", "b", code=75
    )
    for name, (_, remedy) in refused.items():
        message = say("inspect", f"{name}@v1", "--convert", "b", code=64)
        assert remedy.format(name) in message
        assert message.count("\n") == 1
    assert "only data sets of the Hub have subsets" in say(
        "inspect", "out", "--subset", "main", "--convert", "b", code=64
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tiny", "--model", MODEL], "model.path=FOLDER"),
        (["tiny", "--convert", "out"], "--convert goes with DATA"),
        (["rows.jsonl", "--loss"], "say --model FOLDER"),
        (["rows.jsonl", "--columns", "a,b"], "go with --convert"),
        (["rows.jsonl", "--convert", "out", "--columns", "a"], "two names"),
        (["rows.jsonl", "--convert", "out", "--columns", "a,,b"], "two names"),
        (["rows.jsonl", "--convert", "out", "--model", MODEL], "only writes rows"),
        (["rows.jsonl", "--convert", "out", "--html", "x.html"], "only writes rows"),
        (["rows.jsonl", "--rows", "0"], "--rows 0"),
        (["rows.jsonl", "--loss-rows", "5"], "goes with --loss"),
        (["rows.jsonl", "run.steps=3"], "only its own keys"),
        (["rows.jsonl", "data.path=x"], "only its own keys"),
        (["nowhere"], "neither a recipe nor data"),
        (["rows.jsonl", "--html", "no/such/folder.html"], "--html: no/such/folder.html"),
        (["rows.jsonl", "--html", "rows.jsonl"], "--html: rows.jsonl: is read here"),
        (["tiny", "--loss", f"model.path={MODEL}", "model.init=random"], "leave --loss out"),
    ],
)
def test_words_that_do_not_go_together_are_one_line(
    words: list[object], says: str, say: Callable[..., str], write: Callable[..., Path]
) -> None:
    write("rows.jsonl", chat("a", "b"))
    text = say("inspect", *words, code=64)
    assert says in text
    assert text.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == ["rows.jsonl"]
    assert rows_of("rows.jsonl") == [chat("a", "b")]
