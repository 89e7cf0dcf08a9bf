"""Published chat templates x conversations: exactly the assistant's text and its stop are learnt.

The templates come in TRL's package, which is installed without what it depends on and is never imported. What is
expected is put together from the conversation: each answer that is to be learnt, in order, between marks of the
template and the token at which generation stops.
"""

from __future__ import annotations

import re
from contextlib import suppress
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from support.byte_tokenizer import byte_tokenizer

from mlx_empire.data.chat import Remarks
from mlx_empire.data.encode import encode_rows
from mlx_empire.data.files import RawRow
from mlx_empire.errors import UserError

PACKAGE = find_spec("trl")
FOLDER = Path(PACKAGE.origin).parent / "chat_templates" if PACKAGE and PACKAGE.origin else None
FILES = [file for file in sorted(FOLDER.glob("*.jinja")) if "_training" not in file.name] if FOLDER else []
# By what a template has, the first counts: the tokens at which such a model stops.
STOPS = {
    "<|return|>": ("<|return|>", "<|call|>", "<|end|>"),
    "<|observation|>": ("<|user|>", "<|observation|>", "<|endoftext|>"),
    **{
        end: (end,)
        for end in (
            *("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|END_OF_TURN_TOKEN|>", "<|eot|>"),
            *("<｜end▁of▁sentence｜>", "<end_of_utterance>", "<|end|>", "</s>"),
        )
    },
}
SPECIAL = re.compile(
    r"<\|[^|<>]{1,40}\|>|<｜[^｜<>]+｜>|</s>|<(?:start|end)_of_(?:turn|utterance|image)>|<\|turn>|<turn\|>|\[gMASK\]|<sop>"
)
# Marks that a template has the assistant write itself, around what it says.
MARKS = re.compile(r"(?:\s|</?think>|<\|(?:channel|message|START_RESPONSE|END_RESPONSE)\|>|final| to=user)*")
TEXTS = st.text(
    st.characters(exclude_categories=("Cs", "Co", "Cc"), exclude_characters="|<"), max_size=8
).map(lambda text: f"Q{text}Z")
TALKS = st.tuples(
    st.none() | TEXTS, st.lists(st.tuples(TEXTS, TEXTS, st.booleans()), min_size=1, max_size=3)
).filter(lambda talk: any(learnt for _, _, learnt in talk[1]))

pytestmark = pytest.mark.skipif(
    not FILES, reason="make test-interop installs the package that has the templates"
)


@pytest.fixture(scope="module", params=FILES, ids=lambda file: file.stem)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With the template, and with its special tokens and stops."""
    template = request.param.read_text()
    stops = next(stops for mark, stops in STOPS.items() if mark in template)
    specials = tuple(dict.fromkeys((*SPECIAL.findall(template), *stops, "<bos>")))
    made = byte_tokenizer(
        tmp_path_factory.mktemp("t") / "model", template, specials, stops, stops[0], "<bos>"
    )
    made.stops = stops
    return made


def learnt_texts(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[str], Remarks]:
    """The text of each run of targets."""
    remarks = Remarks()
    (document,) = encode_rows(
        [RawRow("here:1", {"messages": messages})], "chat", tokenizer, True, None, remarks
    )
    runs = groupby(
        zip(document.tokens.tolist(), document.counted.tolist(), strict=True), key=lambda pair: pair[1]
    )
    return [tokenizer.decode([token for token, _ in run]) for counted, run in runs if counted], remarks


def takes_system(tokenizer: Any) -> bool:
    """Whether the template prints a system message, as text or as a list of parts."""
    soft, hard = (([{"type": "text", "text": text}], text) for text in ("Soft", "Hard"))
    for contents in zip(soft, hard, strict=True):
        talk = [{"role": r, "content": c} for r, c in zip(("system", "user"), contents, strict=True)]
        with suppress(TemplateError, TypeError):
            if "Soft" in tokenizer.apply_chat_template(talk, tokenize=False):
                return True
    return False


@settings(max_examples=12, deadline=None)
@given(talk=TALKS)
def test_exactly_the_assistants_text_and_its_stop_are_learnt(tokenizer: Any, talk: Any) -> None:
    system, rounds = talk
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for question, answer, learnt in rounds:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer, "weight": int(learnt)})
    if system and not takes_system(tokenizer):
        with pytest.raises(UserError, match=r"\Ahere:1: [^\n]*\Z"):
            learnt_texts(tokenizer, messages)
        messages = messages[1:]
    found, remarks = learnt_texts(tokenizer, messages)
    answers = [answer for _, answer, learnt in rounds if learnt]
    assert len(found) == len(answers)
    for text, answer in zip(found, answers, strict=True):
        before, said, after = text.partition(answer)
        assert said == answer
        assert MARKS.fullmatch(before), text
        stop = next((one for one in tokenizer.stops if one in after), None)
        assert stop is not None, text
        marks, _, rest = after.partition(stop)
        assert MARKS.fullmatch(marks), text
        for (
            one
        ) in tokenizer.stops:  # a template that writes an end of the sequence behind the last turn's own
            rest = rest.replace(one, "")
        assert not rest.strip(), text
    assert remarks.endless == 0


def test_there_are_many() -> None:
    assert len(FILES) >= 30
