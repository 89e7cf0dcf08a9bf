"""Over templates that think, call tools and open turns: exactly the assistant's text and its stop are learnt.

What is expected is put together by hand from the rounds of a conversation: no template is read for it.
"""

import json
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.byte_tokenizer import byte_tokenizer

from mlx_empire.data.chat import Remarks
from mlx_empire.data.encode import encode_rows
from mlx_empire.data.files import RawRow

SPECIALS = (
    "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>",
    "<turn>", "<end>", "<response>", "<|START|>", "<|END|>", "<|USER|>", "<|BOT|>",
)  # fmt: skip
ENDS = ("<|im_end|>", "<|end|>", "<|call|>", "<|return|>", "<end>", "<response>", "<|END|>")
TEXTS = st.text(st.characters(exclude_categories=("Cs", "Co"), exclude_characters="|<"), max_size=8).map(
    lambda text: f"a{text}z"
)


@dataclass
class Round:
    """A question and its answer, perhaps with a thought, and with a call and its result between."""

    question: str
    answer: str
    thought: str | None
    argument: str | None
    result: str
    learnt: tuple[bool, bool]  # the call, the answer
    last: bool = field(default=False)

    @property
    def call(self) -> str:
        return "<call>get_tide " + json.dumps({"harbour": self.argument}, ensure_ascii=False) + "</call>"

    def messages(self):
        thought = {"reasoning_content": self.thought} if self.thought else {}
        found = [{"role": "user", "content": self.question}]
        if self.argument is not None:
            arguments = json.dumps({"harbour": self.argument})
            calls = [
                {"id": "c", "type": "function", "function": {"name": "get_tide", "arguments": arguments}}
            ]
            called = {
                "role": "assistant",
                "content": None,
                "tool_calls": calls,
                "weight": int(self.learnt[0]),
            }
            found.append(called | thought)
            found.append({"role": "tool", "name": "get_tide", "tool_call_id": "c", "content": self.result})
            thought = {}
        return [
            *found,
            {"role": "assistant", "content": self.answer, "weight": int(self.learnt[1])} | thought,
        ]


ROUNDS = st.lists(
    st.builds(
        Round,
        TEXTS,
        TEXTS,
        st.none() | TEXTS,
        st.none() | TEXTS,
        TEXTS,
        st.tuples(st.booleans(), st.booleans()),
    ),
    min_size=1,
    max_size=3,
)
CALLS = (
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{% endfor %}"
)
LAST_QUESTION = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)


def chatml(role, *pieces):
    return [(f"<|im_start|>{role}\n", False), *pieces, ("<|im_end|>\n", pieces[-1][1])]


def keeps_thoughts(r):
    thought = f"<think>{r.thought}</think>" if r.thought else ""
    yield from chatml("user", (r.question, False))
    if r.argument is not None:
        yield from chatml("assistant", (thought + r.call, r.learnt[0]))
        yield from chatml("tool", (r.result, False))
        thought = ""
    yield from chatml("assistant", (thought + r.answer, r.learnt[1]))


def forgets_thoughts(r):
    """The generation prompt opens a thought; before the last question there is none."""
    given, asked = (r.thought or "") + "\n</think>\n\n", "<think>\n"
    yield from chatml("user", (r.question, False))
    if r.argument is not None:
        thinks = [(asked, False), (given, r.learnt[0])] if r.last else []
        yield from chatml("assistant", *thinks, (r.call, r.learnt[0]))
        yield from chatml("tool", (r.result, False))
        given = "\n</think>\n\n"
    thinks = [(asked, False), (given, r.learnt[1])] if r.last else []
    yield from chatml("assistant", *thinks, (r.answer, r.learnt[1]))


def harmony(r):
    """Channels; a thought shows with the last answer alone; a function's name stands above its result once more."""
    final = "<|channel|>final<|message|>" + r.answer + ("<|return|>" if r.last else "<|end|>")
    yield f"<|start|>user<|message|>{r.question}<|end|><|start|>assistant", False
    if r.argument is not None:
        arguments = json.dumps({"harbour": r.argument}, ensure_ascii=False)
        yield f" to=get_tide<|channel|>json<|message|>{arguments}<|call|>", r.learnt[0]
        yield f"<|start|>get_tide to=assistant<|message|>{r.result}<|end|><|start|>assistant", False
    elif r.thought and r.last:
        final = f"<|channel|>analysis<|message|>{r.thought}<|end|><|start|>assistant" + final
    yield final, r.learnt[1]


def one_turn(r):
    """Call, result and answer are one turn of the model, in which the result is not the model's."""
    yield f"<turn>user\n{r.question}<end>\n<turn>model\n", False
    if r.argument is not None:
        yield r.call + "<response>", r.learnt[0]
        yield r.result + "</response>", False
    yield r.answer + "<end>\n", r.learnt[1]


def always_opens(r):
    yield from chatml("user", (r.question, False))
    yield from chatml("assistant", (r.answer, r.learnt[1]))
    yield "<|im_start|>assistant\n" if r.last else "", False


def next_opened(r):
    yield f"<|START|><|USER|>{r.question}<|END|><|START|><|BOT|>", False
    yield r.answer + "<|END|>", r.learnt[1]
    yield "<|START|>" if r.last else "", False


GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# name: (template, by hand, has calls and thoughts)
SHAPES = {
    "keeps thoughts": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}"
        "{{ m.content or '' }}" + CALLS + "<|im_end|>\n{% endfor %}" + GENERATION,
        keeps_thoughts,
        True,
    ),
    "forgets thoughts": (
        LAST_QUESTION + "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
        "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
        "{{ m.content or '' }}" + CALLS + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        forgets_thoughts,
        True,
    ),
    "harmony": (
        "{% set ns = namespace(name='') %}{% for m in messages %}"
        "{% if m.role == 'tool' %}<|start|>{{ ns.name }} to=assistant<|message|>{{ m.content }}<|end|>"
        "{% elif m.tool_calls %}{% set f = m.tool_calls[0].function %}{% set ns.name = f.name %}"
        "{% if m.thinking and messages[-1].role != 'assistant' or m.thinking and loop.last %}"
        "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
        "<|start|>assistant to={{ f.name }}<|channel|>json<|message|>{{ f.arguments | tojson }}<|call|>"
        "{% elif m.role == 'assistant' %}{% if m.thinking and loop.last %}"
        "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
        "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
        "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        harmony,
        True,
    ),
    "one turn": (
        "{% for m in messages %}{% set before = messages[loop.index0 - 1].role if loop.index0 else '' %}"
        "{% if m.role == 'tool' %}{{ m.content }}</response>{% else %}"
        "{% if before != 'tool' %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{% endif %}"
        "{{ m.content or '' }}"
        + CALLS
        + "{{ '<response>' if m.tool_calls else '<end>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role not in ('tool', 'assistant') %}<turn>model\n{% endif %}",
        one_turn,
        True,
    ),
    "always opens a turn": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}",
        always_opens,
        False,
    ),
    "the next turn is opened": (
        "<|START|>{% for m in messages %}{{ '<|BOT|>' if m.role == 'assistant' else '<|USER|>' }}{{ m.content }}"
        "<|END|><|START|>{% endfor %}{% if add_generation_prompt %}<|BOT|>{% endif %}",
        next_opened,
        False,
    ),
    "parts alone": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[0]['text'] }}<|im_end|>\n{% endfor %}"
        + GENERATION,
        keeps_thoughts,
        False,
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("shapes") / "model", "", SPECIALS, ENDS, "<|im_end|>")


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=25, deadline=None)
@given(rounds=ROUNDS)
def test_exactly_the_assistants_text_and_its_stop_are_targets(tokenizer, name, rounds):
    tokenizer.chat_template, by_hand, everything = SHAPES[name]
    rounds[-1].last = True
    for r in rounds:
        r.thought = r.thought if everything and name != "one turn" else None  # which prints none
        r.argument = r.argument if everything else None
    messages = [message for r in rounds for message in r.messages()]
    remarks = Remarks()
    (document,) = encode_rows(
        [RawRow("here:1", {"messages": messages})], "chat", tokenizer, True, None, remarks
    )
    tokens, flags = [], []
    for text, learnt in (piece for r in rounds for piece in by_hand(r)):
        ids = tokenizer.encode(text, add_special_tokens=False)
        tokens += ids
        flags += [int(learnt)] * len(ids)
    assert document.tokens.tolist() == tokens
    assert document.counted.tolist() == flags
    assert remarks.endless == 0
