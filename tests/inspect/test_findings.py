"""`mlx-empire inspect`: faults that were put into data are all found, each by file and line, and nothing else is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.byte_tokenizer import byte_tokenizer
from support.rows import FIXTURES, MODEL, chat
from tokenizers import Tokenizer, models, pre_tokenizers

from mlx_empire.data.files import locate
from mlx_empire.inspect import walk

LONG = "once upon a time there was a little girl who liked to play " * 3
# By line of train.jsonl, from 1.
TRAIN = [
    chat("What is a cat?", "An animal that says meow."),
    chat("What is a dog?", "An animal that barks."),
    "{broken",
    chat("What is a cat?", "An animal that says meow."),  # line 1 again
    chat("what is a CAT", "An animal, that says meow!"),  # its words again
    chat("What is a dog?", "A kind of sausage."),  # otherwise than line 2
    "",
    {"prompt": "other", "completion": "format"},
    chat(LONG, "Lost."),  # nothing to learn within the length
    chat("What is a bird?", LONG),  # cut
    {"messages": [{"role": "wizard", "content": "x"}, {"role": "assistant", "content": "y"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]},
    chat("What is a fish?", "It swims."),
]
VALID = [
    chat("What is a tree?", "It grows."),
    chat("What is a fish?", "It swims."),  # line 13 of train.jsonl
    chat("What is a fish?", "it SWIMS"),  # its words
    chat("What is a dog?", "A friend."),  # asks what line 2 asks
    "[1]",
]
REFUSED = {"train.jsonl": (3, 8, 11, 12), "valid.jsonl": (5,)}


def places(document: Any) -> dict[str, list[str]]:
    """By finding `file:line` of each row, with the row that it is compared with."""
    return {
        one["name"]: [
            place["where"] + (f" {place['says']}" if place["says"].startswith(("as ", "otherwise ")) else "")
            for place in one["places"]
        ]
        for one in document["findings"]
    }


def test_planted_faults_are_all_found_by_file_and_line(
    found: Callable[..., Any], write: Callable[..., Any]
) -> None:
    write("set/train.jsonl", *TRAIN)
    write("set/valid.jsonl", *VALID)
    document = found("set", "--model", MODEL, "data.sequence_length=64", code=64)
    train, valid = "set/train.jsonl", "set/valid.jsonl"
    assert places(document) == {
        "refused": [f"set/{file}:{line}" for file, lines in REFUSED.items() for line in lines],
        "leakage_exact": [f"{valid}:2 as {train}:13"],
        "leakage_words": [f"{valid}:3 as {train}:13"],
        "leakage_prompt": [f"{valid}:4 as {train}:2"],
        "dropped_train": [f"{train}:9"],
        "cut_train": [f"{train}:9", f"{train}:10"],
        "duplicates_exact": [f"{train}:4 as {train}:1"],
        "duplicates_words": [f"{train}:5 as {train}:1"],
        "contradictions": [f"{train}:6 otherwise {train}:2"],
    }
    assert {one["name"]: one["count"] for one in document["findings"]} == {
        name: len(lines) for name, lines in places(document).items()
    }
    reasons = [place["says"] for place in document["findings"][0]["places"]]
    for reason, words in zip(
        reasons,
        ("not JSON", "no 'messages'", "'wizard' is not known", "'weight' is 0.5", "not an object"),
        strict=True,
    ):
        assert words in reason
    assert document["next"] is None


def test_without_a_model_the_same_is_found_but_what_tokens_tell(
    found: Callable[..., Any], write: Callable[..., Any]
) -> None:
    write("set/train.jsonl", *(row for row in TRAIN if row != TRAIN[10]))
    write("set/valid.jsonl", *VALID)
    document = found("set", code=64)
    told = places(document)
    assert told.keys() == {
        "refused",
        *(f"leakage_{kind}" for kind in ("exact", "words", "prompt")),
        "duplicates_exact",
        "duplicates_words",
        "contradictions",
    }
    assert told["refused"] == [f"set/train.jsonl:{n}" for n in (3, 8, 11)] + ["set/valid.jsonl:5"]
    assert (document["tokenized"], document["parts"][0]["tokens"]) == (False, 0)


def test_leaks_alone_end_with_65_and_what_is_only_worth_a_look_with_0(
    found: Callable[..., Any], write: Callable[..., Any]
) -> None:
    write("set/train.jsonl", TRAIN[0], TRAIN[3], TRAIN[5])
    write("set/valid.jsonl", TRAIN[0])
    assert [one["name"] for one in found("set", code=65)["findings"]] == ["leakage_exact", "duplicates_exact"]
    write("set/valid.jsonl", VALID[0])
    document = found("set", code=0)
    assert [one["name"] for one in document["findings"]] == ["duplicates_exact"]
    assert document["next"] == "mlx-empire inspect set --model FOLDER"


def test_rows_that_the_run_would_hold_out_leak_too(
    found: Callable[..., Any], write: Callable[..., Any]
) -> None:
    """Each row stands there twice, so that whichever are held out, most of them are in the training data."""
    rows = [chat(f"What is {n}?", f"A number, {n}.") for n in range(20)]
    write("rows.jsonl", *rows, *rows)
    document = found("rows.jsonl", "--model", MODEL, "data.validation_split=0.25", code=65)
    train, valid = document["parts"]
    assert (train["rows"], valid["rows"]) == (30, 10)
    (leaks,) = [one for one in document["findings"] if one["name"] == "leakage_exact"]
    assert leaks["count"] >= 1
    for place in leaks["places"]:
        here, there = (int(text.rpartition(":")[2]) for text in (place["where"], place["says"]))
        assert abs(here - there) == 20


def test_a_split_of_which_nothing_is_learnt_is_what_a_run_refuses(
    found: Callable[..., Any], write: Callable[..., Any]
) -> None:
    write("rows.jsonl", chat(LONG, "Lost."))
    names = [
        one["name"]
        for one in found("rows.jsonl", "--model", MODEL, "data.sequence_length=16", code=64)["findings"]
    ]
    assert names == ["empty_train", "dropped_train", "cut_train"]


def test_evaluations_that_a_recipe_asks_for_without_rows_to_measure_are_what_a_run_refuses(
    found: Callable[..., Any], write: Callable[..., Any]
) -> None:
    write("rows.jsonl", *(chat(f"What is {n}?", f"A number, {n}.") for n in range(9)))
    words = ["tiny", f"model.path={MODEL}", "data.path=rows.jsonl"]
    document = found(*words, code=64)
    (one,) = document["findings"]
    assert (one["name"], one["count"]) == ("unmeasured", 9)
    assert one["sentence"].startswith("run.eval_every: 10: there is no validation data; add a valid.jsonl")
    assert document["next"] is None
    for mended in ("run.eval_every=null", "data.validation_split=0.2"):
        assert found(*words, mended)["next"].startswith("mlx-empire train ")


def test_a_system_prompt_that_only_the_template_has_is_told(
    found: Callable[..., Any], write: Callable[..., Any], tmp_path: Any
) -> None:
    template = (
        "{%- if messages[0]['role'] != 'system' %}<s>system\nYou are a helpful robot.<e>{% endif %}"
        "{%- for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}<e>{% endfor %}"
        "{%- if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    byte_tokenizer(tmp_path / "model", template, ("<s>", "<e>"), ("<e>",), eos="<e>")
    write("rows.jsonl", chat("Why is it so?", "Because."), chat("Why not?", "It cannot be."))
    document = found("rows.jsonl", "--model", "model")
    assert document["begins_with"]["text"] == "<s>system\nYou are a helpful robot.<e><s>user\nWhy "
    assert document["begins_with"]["template"] == "<s>system\nYou are a helpful robot.<e><s>user\n"
    (hidden,) = document["findings"]
    assert (hidden["name"], hidden["count"]) == ("hidden_prompt", 2)
    assert hidden["sentence"].endswith("only the chat template has: 'You are a helpful robot.'")

    own = [{"role": "system", "content": "You are a helpful robot."}]
    rows = [{"messages": own + chat(f"Why {n}?", f"Because {n}.")["messages"]} for n in range(2)]
    write("rows.jsonl", *rows)
    document = found("rows.jsonl", "--model", "model")
    assert document["begins_with"]["template"] == "<s>system\n"
    assert document["findings"] == []


def test_characters_that_the_tokenizer_does_not_know_are_told(
    found: Callable[..., Any], write: Callable[..., Any], tmp_path: Any
) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "cat": 2, "dog": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["<unk>", "</s>"])
    (tmp_path / "model").mkdir()
    words.save(str(tmp_path / "model" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"}
    write("model/tokenizer_config.json", config)
    write("model/config.json", {"model_type": "llama", "vocab_size": 4})
    write("rows.jsonl", *({"text": text} for text in ("cat dog cat", "cat bird", "dog", "猫 猫 dog")))
    (unknown,) = found("rows.jsonl", "--model", "model")["findings"]
    assert unknown["name"] == "unknown_train"
    assert unknown["places"] == [
        {"where": "rows.jsonl:2", "says": "1 token"},
        {"where": "rows.jsonl:4", "says": "2 tokens"},
    ]


def test_keys_that_only_another_tool_reads_are_told(
    found: Callable[..., Any], write: Callable[..., Any]
) -> None:
    """Stanford's Alpaca has a column text too, with all of it rendered: a run told to read that learns prompts."""
    write(
        "rows.jsonl", *({"instruction": f"{n}?", "output": "x", "text": f"{n}? x", "id": n} for n in range(3))
    )
    document = found("rows.jsonl", "data.format=text")
    assert document["format"] == "text"
    assert document["not_read"] == {"instruction": 3, "output": 3, "id": 3}
    (other,) = document["findings"]
    assert (other["name"], other["count"]) == ("other_layout", 3)
    assert "mlx-empire inspect rows.jsonl --convert OUT" in other["sentence"]
    write(
        "rows.jsonl",
        {"text": "x", "chosen": "y", "output": None},
        {"text": "z", "input_ids": [1], "chosen": None},
    )
    assert found("rows.jsonl", "data.format=text")["not_read"] == {"chosen": 1, "input_ids": 1}
    others = [one["sentence"] for one in found("rows.jsonl", "data.format=text")["findings"]]
    assert len(others) == 2
    assert "--convert" not in "".join(others), "no conversion reads these keys"


def test_documents_that_are_not_utf_8_are_refused_each_by_its_line(
    found: Callable[..., Any], say: Callable[..., str]
) -> None:
    Path("books").mkdir()
    for name, content in (("a", b"One.\nTwo."), ("b", b"One.\n\xff\xfe"), ("c", b"Three.")):
        Path(f"books/{name}.txt").write_bytes(content)
    document = found("books", code=64)
    assert places(document) == {"refused": ["books/b.txt:2"]}
    assert document["parts"][0]["rows"] == 2
    alone = say("inspect", "books/b.txt", code=64)
    assert alone.count("\n") == 1
    assert "books/b.txt:2: not UTF-8" in alone


def test_one_document_whose_end_is_held_out_is_not_too_few_rows(found: Callable[..., Any]) -> None:
    """Where its end begins only tokens tell; a run holds it out."""
    Path("book.txt").write_text("A cat sat there. " * 200)
    document = found("book.txt", "data.validation_split=0.1")
    assert [(part["name"], part["rows"]) for part in document["parts"]] == [("train", 1)]


def test_what_all_rows_begin_with_is_looked_for_in_their_beginnings_alone(
    write: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one long row that would be all of it, again and again."""
    monkeypatch.setattr(walk, "MOST_SHARED", 50)
    path = write("rows.jsonl", *({"tokens": [7] * 100 + [n]} for n in range(3)))
    reading = walk.Reading(path, "tokens", 200, False, True, 0.0, None, None)
    seen = walk.Walk(reading, shown=1).over(locate(path)[0], lambda count: None)
    assert seen.shared.tolist() == [7] * 50


@pytest.mark.parametrize("alike", [True, False])
def test_answers_that_say_one_thing_are_told(
    alike: bool, found: Callable[..., Any], write: Callable[..., Any]
) -> None:
    kinds = ("cat", "dog", "bird", "fish", "tree")
    same = [
        chat(f"What is {n}?", f"I am sorry, but I cannot tell you about the {kinds[n % 5]}.")
        for n in range(60)
    ]
    lines = (FIXTURES / "wordnet" / "train.jsonl").read_text().splitlines()
    write("rows.jsonl", *(same if alike else lines[:60]))
    document = found("rows.jsonl")
    assert ("collapse" in places(document)) == alike
    variety = document["variety"]
    assert (variety["compression"] > 6) == alike
    if alike:
        words = [f"i am sorry but i cannot tell you about the {kind}".split() for kind in kinds]
        pairs = {pair for one in words for pair in itertools.pairwise(one)}
        assert variety["distinct"]["2"] == len(pairs) / (60 * 10)
        assert variety["commonest"] == 0.2
