"""Conversions beside what the package `datasets` itself reads of the same files. It is optional: skipped without it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hub import StubHub
from support.rows import FIXTURES

datasets = pytest.importorskip("datasets", reason="the optional package datasets is not installed")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = [
    {"instruction": "Say, hi", "input": "", "output": 'He said "hi"\nand left', "id": 1},
    {"instruction": "Add", "input": "1,1", "output": "2", "id": 2},
    {"instruction": "Lost", "input": "", "output": "", "id": 3},
]


def write_table(file: Path) -> None:
    """The rows in a file of the kind that its suffix says."""
    if file.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(ROWS))
    else:
        with file.open("w", newline="") as cells:
            writer = csv.DictWriter(cells, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)


def by_datasets(kind: str, file: Path) -> list[dict[str, Any]]:
    """The rows of a file as `datasets` reads them, written as conversations."""
    made = []
    for row in datasets.load_dataset(kind, data_files=str(file), split="train", streaming=True):
        if row["output"]:
            asked = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
            made.append({"messages": messages})
    return made


@pytest.mark.parametrize("kind", ["csv", "parquet", "json"])
def test_a_file_is_read_as_datasets_reads_it(kind: str, found: Callable[..., Any]) -> None:
    file = Path(f"a.{kind}")
    write_table(file)
    (part,) = found(file, "--convert", "out.jsonl")["parts"]
    written = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert written == by_datasets(kind, file)
    assert len(written) == 2
    assert part["not_carried"] == {"id": 3}
    assert part["dropped"] == 1


def test_a_table_that_training_reads_is_inspected_as_lines_are(found: Callable[..., Any]) -> None:
    lines = (FIXTURES / "wordnet" / "train.jsonl").read_text().splitlines()[:20]
    parquet.write_table(pyarrow.Table.from_pylist([json.loads(line) for line in lines]), "a.parquet")
    Path("a.jsonl").write_text("".join(line + "\n" for line in lines))
    first, second = (json.dumps(found(name)) for name in ("a.parquet", "a.jsonl"))
    assert first.replace("a.parquet", "a.jsonl") == second


def test_a_data_set_of_the_hub_is_streamed(tmp_path: Path) -> None:
    """In a process of its own: the package takes the Hub's address when it is imported."""
    files = {
        "README.md": b"# A card",
        "train.csv": b"question,answer\nWhy?,So.\nHow?,\n",
        "validation.csv": b"question,answer\nWhen?,Now.\n",
        "test.csv": b"question,answer\nWho?,Me.\n",
    }
    with StubHub("own/data", files, kind="datasets") as hub:
        variables = os.environ | {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        }

        def convert(named: str, code: int) -> Any:
            words = ["inspect", named, "--convert", str(tmp_path / "out"), "--json"]
            done = subprocess.run(
                [sys.executable, "-m", "mlx_empire", *words],
                env=variables, capture_output=True, text=True, timeout=200, check=False,
            )  # fmt: skip
            assert done.returncode == code, done.stderr
            return json.loads(done.stdout) if code == 0 else done.stderr

        assert "nor a data set that the Hub shows you" in convert("own/nothing", 64)
        document = convert("own/data@main", 0)
    train, valid = document["parts"]
    assert (train["written"], valid["written"], document["left_out"]) == (1, 1, ["test"])
    assert train["dropped_at"] == [{"where": "own/data@main/train:2", "says": "'answer' is missing"}]
    for name, asked, answer in (("train", "Why?", "So."), ("valid", "When?", "Now.")):
        (line,) = (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        assert json.loads(line) == {"messages": messages}


def test_a_hub_that_cannot_be_reached_is_one_line(
    say: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    text = say("inspect", "nobody/nothing", "--convert", "out", code=75)
    assert text.count("\n") == 1
    assert "the Hub was not reached" in text
