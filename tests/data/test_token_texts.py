"""The text of each token: together they are the text, and one that joins in no other way is not the last that shows."""

from collections.abc import Sequence

from mlx_empire.data.token_texts import LONGEST_CHARACTER, token_texts


def in_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def test_texts_of_tokens_join_to_the_text_also_where_a_character_has_several() -> None:
    data = "für 🙂 x".encode()
    found = token_texts(list(data), in_bytes)
    assert len(found) == len(data)
    assert "".join(found) == "für 🙂 x"
    assert found[:4] == ["f", "", "ü", "r"]


def test_a_token_that_changes_the_text_before_it_does_not_blank_those_after_it() -> None:
    """Tokenizers that clean up take the blank off before a full stop."""
    words = [" Well", " .", " No", " more", " !", " End"]

    def clean(ids: Sequence[int]) -> str:
        return "".join(words[one] for one in ids).strip().replace(" .", ".").replace(" !", "!")

    found = token_texts(range(6), clean)
    assert "".join(found) == clean(range(6)) == "Well. No more! End"
    assert found == ["Well", ".", " No", " more", "!", " End"]


def test_what_is_decoded_at_once_does_not_grow_with_the_row() -> None:
    asked: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        asked.append(len(ids))
        return in_bytes(ids)

    token_texts(list(b"abc\xff\xfe" * 400), decode)
    assert max(asked) <= LONGEST_CHARACTER + 1
    assert len(asked) <= 3 * 2000
