"""A text that is tokenised in parts has the tokens that it has whole, and is never in memory as a whole."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from mlx_empire.data import encode, long_text
from mlx_empire.data.encode import encode_rows
from mlx_empire.data.files import RawRow, Source
from mlx_empire.data.long_text import rows_in_parts, tokens_in_parts
from mlx_empire.data.splits import Splits, load_splits
from mlx_empire.errors import UserError

ODD = [
    "é",
    "你好",
    "\N{GRINNING FACE}",
    "\n\n",
    "\n",
    "  ",
    "    ",
    "word ",
    "x1234567 ",
    "<|im_end|>",
    "e\u0301 ",
]


def speeches(fixtures: Path) -> str:
    lines = (fixtures / "speeches" / "train.jsonl").read_text().splitlines()
    return " ".join(json.loads(line)["text"] for line in lines[:20])


def long_texts(fixtures: Path) -> dict[str, str]:
    """What a window may cut: prose, code, several bytes a character, blanks, words without an end."""
    rng = random.Random(7)
    plain = speeches(fixtures)
    odd = "".join(rng.choices(ODD, k=4000))
    code = "".join("    " * rng.randrange(5) + "def f(x):\n" + "\n" * rng.randrange(3) for _ in range(900))
    endless = "".join(rng.choices("abcdefABCDEF0123456789+/", k=6000))
    found = {"plain": plain, "odd": odd, "code": code, "endless": endless, "blanks": " " * 6000 + "b"}
    return found | {"mixed": plain[:9000] + endless[:2000] + odd[:9000] + code[:9000] + "a" * 4000 + plain}


@pytest.fixture
def like_sentencepiece(fixtures: Path) -> Tokenizer:
    """As Llama 2's: the whole text is one word, and a mark stands before it and for blanks."""
    made = Tokenizer(BPE(unk_token="<unk>", byte_fallback=False))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = speeches(fixtures)[:30000].split()
    made.train_from_iterator(words, BpeTrainer(vocab_size=600, special_tokens=["<unk>"]))
    return made


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("window", [1000, 4096])
def test_parts_have_the_tokens_of_the_whole(
    kind: str,
    window: int,
    fixtures: Path,
    tokenizer: Any,
    like_sentencepiece: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside = tokenizer._tokenizer.backend_tokenizer if kind == "bytes" else like_sentencepiece
    monkeypatch.setattr(long_text, "WINDOW", window)
    monkeypatch.setattr(long_text, "OVERLAP", 400)

    def pairs(texts: list[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        assert all(len(text) <= window + 400 for text in texts)
        return ((e.ids, e.offsets) for e in inside.encode_batch(texts, add_special_tokens=False))

    for name, text in long_texts(fixtures).items():
        whole = inside.encode(text, add_special_tokens=False).ids
        parts = [text[start : start + 777] for start in range(0, len(text), 777)]
        found = list(tokens_in_parts(parts, pairs))
        assert len(found) > len(text) // window - 1
        assert np.concatenate(found).tolist() == whole, name


def test_where_windows_never_agree_the_second_begins_at_the_last_token_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tokenizer that counts: pairs of letters from where a text begins, and each text a number of its own."""
    monkeypatch.setattr(long_text, "WINDOW", 101)
    monkeypatch.setattr(long_text, "OVERLAP", 40)
    begun: list[str] = []

    def encode(texts: list[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        for text in texts:
            begun.append(text)
            places = range(0, len(text), 2)
            yield (
                [1000 * len(begun) + ord(text[p]) for p in places],
                [(p, min(p + 2, len(text))) for p in places],
            )

    text = "".join(chr(97 + n % 26) for n in range(500))
    tokens = np.concatenate(list(tokens_in_parts([text], encode)))
    assert len(tokens) == 250
    assert [chr(t % 1000) for t in tokens.tolist()] == list(text[::2])


@pytest.mark.parametrize("adds", [[], [0]])
def test_a_long_row_is_the_document_that_it_was(
    adds: list[int], fixtures: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_added", lambda _: (adds, []))
    row = RawRow("here:1", {"text": speeches(fixtures)})
    rows = [RawRow("here:0", {"text": "Short."}), row, RawRow("here:2", {"text": "Short."})]
    before = list(encode_rows(rows, "text", tokenizer, True, 512))
    monkeypatch.setattr(encode, "CHARACTERS", 5000)
    monkeypatch.setattr(long_text, "WINDOW", 3000)
    parts = list(encode_rows(rows, "text", tokenizer, True, 512, whole=False))
    after = list(encode_rows(rows, "text", tokenizer, True, 512))
    assert len(parts) > 5
    assert [one.more for one in parts] == [False, *[True] * (len(parts) - 3), False, False]
    for a, b in zip(before, after, strict=True):
        assert a.where == b.where
        assert np.array_equal(a.tokens, b.tokens)
        assert np.array_equal(a.counted, b.counted)


@pytest.mark.parametrize(("packing", "split"), [(False, 0.2), (True, 0.0)])
def test_long_files_are_the_rows_that_they_were(
    packing: bool,
    split: float,
    fixtures: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, text in {"a": speeches(fixtures), "b": "Short.", "c": speeches(fixtures)[::-1]}.items():
        (tmp_path / f"{name}.txt").write_text("\ufeff" + text, encoding="utf-8")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text(speeches(fixtures))

    def loaded(path: Path, cache: str) -> Splits:
        monkeypatch.setenv("MLX_EMPIRE_CACHE", str(tmp_path / cache))
        return load_splits(
            path=path,
            sequence_length=50,
            tokenizer_folder=tokenizer_folder,
            packing=packing,
            validation_split=split,
        )

    paths = [tmp_path, tmp_path / "one"]
    whole = [loaded(path, "whole") for path in paths]
    monkeypatch.setattr(encode, "CHARACTERS", 5000)
    monkeypatch.setattr(long_text, "PART_BYTES", 4000)
    monkeypatch.setattr(long_text, "WINDOW", 3000)
    for path, before in zip(paths, whole, strict=True):
        after = loaded(path, "parts")
        assert after.digest == before.digest
        assert after.report[:-1] == before.report[:-1]


@pytest.mark.parametrize(
    "content", [b"", b"\xef\xbb\xbf", b"a", b"a\nb\xc3", b"\xff", b"ab\ncd\nef\xffgh\n", "é\n".encode() * 9]
)
def test_a_document_in_parts_is_read_or_refused_as_a_whole_one(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_text, "PART_BYTES", 3)
    (tmp_path / "a.txt").write_bytes(content)
    source = Source(".txt", tmp_path, (tmp_path / "a.txt",))
    said = []
    for read in (source.rows, lambda: rows_in_parts(source)):
        try:
            said.append("".join(row.value["text"] for row in read()))
        except UserError as error:
            said.append(f"refused: {error}")
    assert said[0] == said[1]


def test_of_a_large_document_little_is_in_memory(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 million characters; a tokenizer that gives each four of them a token, for the real one's time."""
    (tmp_path / "a.txt").write_text("abcdefg " * 250_000)

    def whole(texts: list[str], **_: object) -> dict[str, list[Any]]:
        places = [range(0, len(text), 4) for text in texts]
        return {
            "input_ids": [[5] * len(p) for p in places],
            "offset_mapping": [[(n, n + 4) for n in p] for p in places],
        }

    fake = SimpleNamespace(
        _tokenizer=whole, is_fast=True, bos_token_id=None, eos_token_id=2, has_chat_template=False
    )
    monkeypatch.setattr("mlx_empire.data.splits.load_tokenizer", lambda _: fake)
    monkeypatch.setattr("mlx_empire.data.chat.Stops.of", lambda _: None)
    monkeypatch.setattr(encode, "_added", lambda _: ([], []))
    monkeypatch.setattr(long_text, "WINDOW", 2**14)
    tracemalloc.start()
    loaded = load_splits(path=tmp_path / "a.txt", sequence_length=512, tokenizer_folder=tmp_path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(loaded.train.parts[0].table.tokens) > 500_000
    assert most < 20e6, "of all tokens with their places it would be 80 MB"
