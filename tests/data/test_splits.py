"""`data:` as a whole: real files in, two sets and a report out."""

import json

import pytest

from mlx_empire.data.splits import load_splits
from mlx_empire.errors import UserError


def numbered(count: int) -> list[dict]:
    """Rows of four tokens whose first token is the row's number."""
    return [{"tokens": [n, 900, 901, 902]} for n in range(count)]


def first_tokens(dataset) -> set[int]:
    return {int(dataset.row(index).inputs[0]) for index in range(len(dataset))}


def test_conversations_in_targets_out(fixtures, tokenizer_folder, tokenizer):
    """The decoded targets of an epoch are the answers of the file, all of them and nothing else."""
    loaded = load_splits(
        path=fixtures / "wordnet",
        sequence_length=512,
        packing=True,
        tokenizer_folder=tokenizer_folder,
        vocab_size=512,
    )
    for name, dataset in (("train", loaded.train), ("valid", loaded.valid)):
        lines = (fixtures / "wordnet" / f"{name}.jsonl").read_text().splitlines()
        answers = sorted(json.loads(line)["messages"][1]["content"] + "<|im_end|>\n" for line in lines)
        found = []
        assert dataset is not None
        for index in range(len(dataset)):
            row = dataset.row(index)
            for number in range(row.documents[-1] + 1):
                mine = row.targets[(row.documents == number) & (row.mask == 1)]
                found.append(tokenizer.decode(mine.tolist()))
        assert sorted(found) == answers


def test_speeches_come_back_whole(fixtures, tokenizer_folder, tokenizer):
    """Unpacked pieces in order, joined by their targets, are the file's text."""
    loaded = load_splits(path=fixtures / "speeches", sequence_length=100, tokenizer_folder=tokenizer_folder)
    lines = (fixtures / "speeches" / "train.jsonl").read_text().splitlines()
    encoded = [tokenizer.encode(json.loads(line)["text"]) for line in lines]
    expected = [token for tokens in encoded for token in [*tokens[1:], tokenizer.eos_token_id]]
    found = [
        token for index in range(len(loaded.train)) for token in loaded.train.row(index).targets.tolist()
    ]
    assert found == expected
    assert loaded.train.tokens_per_epoch == len(expected)


def test_tokens_need_no_tokenizer(write):
    loaded = load_splits(path=write("a.jsonl", *numbered(5)), sequence_length=8, vocab_size=1000)
    assert loaded.train.row(0).inputs.tolist() == [0, 900, 901]
    assert loaded.train.row(0).targets.tolist() == [900, 901, 902]
    assert loaded.valid is None


def test_the_validation_split_is_a_fixed_disjoint_share(write):
    path = write("a.jsonl", *numbered(50))
    loaded = load_splits(path=path, sequence_length=8, validation_split=0.1)
    assert loaded.valid is not None
    assert len(loaded.valid) == 5
    assert first_tokens(loaded.train) | first_tokens(loaded.valid) == set(range(50))
    assert not first_tokens(loaded.train) & first_tokens(loaded.valid)
    packed = load_splits(path=path, sequence_length=12, validation_split=0.1, packing=True)
    assert packed.valid is not None
    assert packed.valid.tokens_per_epoch == loaded.valid.tokens_per_epoch


def test_a_validation_file_comes_before_the_split(write, tmp_path):
    write("set/train.jsonl", *numbered(20))
    write("set/valid.jsonl", {"tokens": [999, 1]})
    loaded = load_splits(path=tmp_path / "set", sequence_length=8, validation_split=0.5)
    assert loaded.valid is not None
    assert len(loaded.train) == 20
    assert first_tokens(loaded.valid) == {999}


def test_a_lone_text_gives_its_end(tmp_path, tokenizer_folder, tokenizer):
    text = "We the people of the United States. " * 60
    (tmp_path / "book.txt").write_text(text)
    loaded = load_splits(
        path=tmp_path / "book.txt",
        sequence_length=64,
        validation_split=0.25,
        tokenizer_folder=tokenizer_folder,
    )
    assert loaded.valid is not None
    targets = [
        token
        for dataset in (loaded.train, loaded.valid)
        for index in range(len(dataset))
        for token in dataset.row(index).targets.tolist()
    ]
    assert targets == [*tokenizer.encode(text)[1:], tokenizer.eos_token_id]
    assert round(0.25 * (len(loaded.train) + len(loaded.valid))) == len(loaded.valid)


def test_cut_and_dropped_rows_are_reported(write, tokenizer_folder):
    def talk(question: str, answer: str) -> dict:
        roles = (("user", question), ("assistant", answer))
        return {"messages": [{"role": role, "content": content} for role, content in roles]}

    rows = [talk("Why?", "So."), talk("Why?", "Because " * 50), talk("Why? " * 60, "So.")]
    rows.append({"messages": [{"role": "user", "content": "Nobody answers"}]})
    path = write("a.jsonl", *rows)
    loaded = load_splits(path=path, sequence_length=60, tokenizer_folder=tokenizer_folder)
    assert len(loaded.train) == 2
    assert "4 chat rows read, 2 rows" in loaded.report[0]
    assert "2 cut at 60 positions" in loaded.report[0]
    assert "2 dropped for want of a target" in loaded.report[0]


@pytest.mark.parametrize(
    ("name", "lines", "options", "says"),
    [
        ("a.jsonl", [], {}, "no rows"),
        ("a.jsonl", [], {"format": "tokens"}, "train split is empty: it has no rows"),
        ("a.jsonl", [{"tokens": [1]}], {}, "none of its 1 rows has a target within 8 positions"),
        ("a.jsonl", [{"tokens": [1, 2]}], {"validation_split": 0.1}, "too few for data.validation_split 0.1"),
        ("a.jsonl", [{"text": "a"}], {}, "no such folder, and this data.format needs the model's tokenizer"),
    ],
)
def test_sets_that_cannot_be_used(name, lines, options, says, write):
    with pytest.raises(UserError, match=says):
        load_splits(path=write(name, *lines), sequence_length=8, **options)


def test_an_empty_validation_file_is_an_error(write, tmp_path):
    write("set/train.jsonl", *numbered(3))
    write("set/valid.jsonl")
    with pytest.raises(UserError, match=r"valid\.jsonl: the valid split is empty: it has no rows"):
        load_splits(path=tmp_path / "set", sequence_length=8)


def test_a_chat_without_a_template_is_refused_with_a_remedy(write, tmp_path, tokenizer_folder):
    config = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    write("model/tokenizer_config.json", config)
    (tmp_path / "model" / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    path = write("a.jsonl", {"messages": [{"role": "user", "content": "a"}]})
    with pytest.raises(UserError, match=r"has no chat template; add chat_template\.jinja"):
        load_splits(path=path, sequence_length=8, tokenizer_folder=tmp_path / "model")
