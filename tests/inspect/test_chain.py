"""The newcomer's line: each command is named by the one before it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

from support.rows import FIXTURES, MODEL, chat


def last_line(text: str) -> list[str]:
    """The words of the command that the last line names."""
    words = shlex.split(text.splitlines()[-1])
    assert words[0] == "mlx-empire"
    return words[1:]


def test_convert_names_inspect_which_names_init_which_names_inspect_which_names_train(
    say: Callable[..., str],
) -> None:
    rows = [{"instruction": f"What is {n}?", "output": f"A number, {n}."} for n in range(8)]
    Path("alpaca.json").write_text(json.dumps(rows))
    words = last_line(say("inspect", "alpaca.json", "--convert", "mine"))
    assert words == ["inspect", "mine", "--model", "FOLDER"]
    words = last_line(say(*[str(MODEL) if word == "FOLDER" else word for word in words]))
    assert words == ["init", "daughter", "--model", str(MODEL), "--data", "mine"]
    words = last_line(say(*words))
    assert words == ["inspect", "mine.yaml"]
    words = last_line(say(*words, "run.steps=3"))
    assert words == ["train", "mine.yaml", "run.steps=3"]


def test_with_a_hostfile_launch_is_named_and_with_leaks_no_training(say: Callable[..., str]) -> None:
    Path("small.txt").write_text("small slots=1 # memory=64GiB limit=48GiB\n")
    data = FIXTURES / "wordnet"
    words = last_line(
        say("init", "tiny", "--model", MODEL, "--data", data, "--out", "a.yaml", "--hosts", "small.txt")
    )
    assert words == ["inspect", "a.yaml", "--hosts", "small.txt"]
    assert last_line(say(*words)) == ["launch", "a.yaml", "--hosts", "small.txt"]
    for name in ("train", "valid"):
        Path(f"set/{name}.jsonl").parent.mkdir(exist_ok=True)
        Path(f"set/{name}.jsonl").write_text(json.dumps(chat("Why?", "So.")) + "\n")
    text = say("inspect", "a.yaml", "data.path=set", code=65)
    assert "take the rows that are in both out" in text.splitlines()[-1]
    assert "mlx-empire train" not in text
