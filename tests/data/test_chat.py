"""Which characters of a conversation are the assistant's, over the kinds of templates models have."""

import pytest
from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset

from mlx_empire.data.encode import encode_rows
from mlx_empire.data.files import RawRow, locate
from mlx_empire.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops the reasoning of earlier turns and writes an empty thought into the last one, as Qwen3 does.
FORGETS_THOUGHTS = (
    "{% for m in messages %}{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}"
    "{% if '</think>' in m.content %}{{ m.content }}{% else %}<think>\n\n</think>\n\n{{ answer }}{% endif %}"
    "{% else %}{{ answer }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Its generation prompt opens a thought that the conversation lacks, as DeepSeek-R1's distillations do.
OPENS_A_THOUGHT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}[A]{{ m.content.split('</think>')[-1] }}[E]"
    "{% else %}[U]{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[A]<think>\n{% endif %}"
)
# No generation prompt at all, trimmed contents, and roles must alternate, as Llama 2 and Mistral have it.
INSTRUCT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }}</s>{% endif %}"
    "{% endfor %}"
)
# No generation prompt, and the end of text only after the last turn.
ENDS_ONCE = (
    "{% for m in messages %}{{ 'A: ' if m.role == 'assistant' else 'U: ' }}{{ m.content | trim }}"
    "{{ '</s>' if loop.last and m.role == 'assistant' else '\n' }}{% endfor %}"
)
TALK = [
    {"role": "user", "content": "What is a walker?"},
    {"role": "assistant", "content": "A person on foot. A person on foot."},
    {"role": "user", "content": "A person on foot."},
    {"role": "assistant", "content": "  Yes, the same.  "},
]
THOUGHTFUL = [
    TALK[0],
    {"role": "assistant", "content": "<think>\nfeet?\n</think>\n\nOne who walks."},
    TALK[2],
    {"role": "assistant", "content": "<think>\nagain\n</think>\n\nYes."},
]


def target_texts(tokenizer, messages, template=None, mask_prompt=True) -> list[str]:
    """The decoded runs of consecutive targets."""
    if template is not None:
        tokenizer.chat_template = template
    row = RawRow("here:1", {"messages": messages})
    (document,) = encode_rows([row], "chat", tokenizer, mask_prompt, None)
    runs: list[list[int]] = [[]]
    for token, counted in zip(document.tokens.tolist(), document.counted, strict=True):
        if counted:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHATML, TALK, ["A person on foot. A person on foot.<|im_end|>\n", "  Yes, the same.  <|im_end|>\n"]),
        (INSTRUCT, TALK, [" A person on foot. A person on foot.</s>", " Yes, the same.</s>"]),
        (OPENS_A_THOUGHT, TALK, ["A person on foot. A person on foot.[E]", "  Yes, the same.  [E]"]),
        (ENDS_ONCE, TALK, ["A: A person on foot. A person on foot.", "A: Yes, the same.</s>"]),
        (
            FORGETS_THOUGHTS,
            TALK,
            [
                "A person on foot. A person on foot.<|im_end|>\n",
                "<think>\n\n</think>\n\n  Yes, the same.  <|im_end|>\n",
            ],
        ),
        (
            FORGETS_THOUGHTS,
            THOUGHTFUL,
            ["One who walks.<|im_end|>\n", "<think>\nagain\n</think>\n\nYes.<|im_end|>\n"],
        ),
        (OPENS_A_THOUGHT, THOUGHTFUL, ["\n\nOne who walks.[E]", "\n\nYes.[E]"]),
    ],
)
def test_every_assistant_turn_and_its_end_are_targets_and_nothing_else(
    tokenizer, template, messages, expected
):
    assert target_texts(tokenizer, messages, template) == expected


def test_system_tool_and_open_user_turns_are_no_targets(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        *TALK,
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Thanks."},
    ]
    expected = [*target_texts(tokenizer, TALK), "<|im_end|>\n"]
    assert target_texts(tokenizer, messages) == expected


def test_without_masking_all_but_the_first_token_are_targets(tokenizer):
    rendered = tokenizer.apply_chat_template(TALK)
    (document,) = encode_rows([RawRow("here:1", {"messages": TALK})], "chat", tokenizer, False, None)
    assert document.tokens.tolist() == rendered
    assert document.counted.tolist() == [0] + [1] * (len(rendered) - 1)


def test_single_turns_agree_with_mlx_lm(fixtures, tokenizer):
    rows = list(locate(fixtures / "wordnet")[0].rows())
    theirs = ChatDataset([row.value for row in rows], tokenizer, mask_prompt=True)
    for ours, row in zip(encode_rows(rows, "chat", tokenizer, True, None), rows, strict=True):
        tokens, offset = theirs.process(row.value)
        assert ours.tokens.tolist() == tokens
        assert ours.counted.tolist() == [0] * offset + [1] * (len(tokens) - offset)


def test_completions_agree_with_mlx_lm(tokenizer):
    values = [{"prompt": "Two and two?", "completion": "Four."}, {"prompt": "", "completion": "So it is.\n"}]
    rows = [RawRow("here:1", value) for value in values]
    theirs = CompletionsDataset(values, tokenizer, "prompt", "completion", True)
    for ours, value in zip(encode_rows(rows, "completions", tokenizer, True, None), values, strict=True):
        tokens, offset = theirs.process(value)
        assert ours.tokens.tolist() == tokens
        assert ours.counted.tolist() == [0] * offset + [1] * (len(tokens) - offset)


def test_tokenizers_without_offsets_give_the_same_targets(tokenizer, monkeypatch):
    expected = target_texts(tokenizer, TALK)
    monkeypatch.setattr(type(tokenizer._tokenizer), "is_fast", property(lambda self: False))
    assert not tokenizer.is_fast
    assert target_texts(tokenizer, TALK) == expected


def test_a_template_that_prints_the_date_gives_the_same_tokens_every_day(tokenizer):
    dated = "Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML
    tokenizer.chat_template = dated
    (document,) = encode_rows([RawRow("here:1", {"messages": TALK})], "chat", tokenizer, False, None)
    assert tokenizer.decode(document.tokens.tolist()).startswith(
        "Today is 01 Jan 2026.\n<|im_start|>user\nWhat"
    )


def test_a_refusing_template_is_a_user_error_with_its_reason(tokenizer):
    with pytest.raises(
        UserError, match=r"^here:1: .*refuses this conversation \(roles must alternate\); correct"
    ):
        target_texts(tokenizer, TALK[1:], INSTRUCT)


def test_a_template_that_hides_the_turns_is_refused_and_can_be_trained_unmasked(tokenizer):
    template = "{{ messages | length }} {% for m in messages | reverse %}{{ m.content }}\n{% endfor %}"
    with pytest.raises(UserError, match=r"here:1: message \d: .*mask_prompt: false"):
        target_texts(tokenizer, TALK, template)
    assert target_texts(tokenizer, TALK, template, mask_prompt=False)
