"""What other tools write in conversations is read as they mean it, or refused in one line that names the key."""

import json

import pytest
from support.byte_tokenizer import byte_tokenizer

from mlx_empire.data.chat import Remarks
from mlx_empire.data.encode import encode_prompt, encode_rows
from mlx_empire.data.files import RawRow
from mlx_empire.data.splits import load_splits
from mlx_empire.errors import UserError

SPECIALS = ("<|im_start|>", "<|im_end|>")
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CLOSE = "<|im_end|>\n{% endfor %}" + PROMPT
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + CLOSE
TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</call>{% endfor %}" + CLOSE
)
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.KEY %}<think>{{ m.KEY }}</think>{% endif %}"
    "{{ m.content or '' }}" + CLOSE
)
ASKS, SAYS = {"role": "user", "content": "Tide?"}, {"role": "assistant", "content": "Low."}
WRONG = {"role": "assistant", "content": "High."}
CALL = {"name": "get_tide", "arguments": {"harbour": "Bergen"}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_tokenizer(
        tmp_path_factory.mktemp("messages") / "model", CHATML, SPECIALS, SPECIALS[1:], SPECIALS[1]
    )


def encoded(tokenizer, messages, template=CHATML, mask_prompt=True, remarks=None, **more):
    """(the whole text, the text of the targets)"""
    tokenizer.chat_template = template
    row = RawRow("train.jsonl:7", {"messages": messages, **more})
    (document,) = encode_rows([row], "chat", tokenizer, mask_prompt, None, remarks)
    tokens = document.tokens
    return tokenizer.decode(tokens.tolist()), tokenizer.decode(tokens[document.counted == 1].tolist())


@pytest.mark.parametrize(
    "key", ["weight", "train", "training", "loss", "trainable", "train_on_turn", "loss_mask"]
)
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (False, True), (0.0, 1.0), (0, None)])
def test_an_answer_that_is_not_to_be_learnt_is_read_and_is_no_target(tokenizer, key, no, yes):
    talk = [ASKS, WRONG | {key: no}, ASKS, SAYS | {key: yes}, ASKS, WRONG | {key: no}]
    text, learnt = encoded(tokenizer, talk)
    assert learnt == "Low.<|im_end|>\n"
    assert text == encoded(tokenizer, [ASKS, WRONG, ASKS, SAYS, ASKS, WRONG])[0]


def test_torchtunes_masked_says_the_opposite_and_zero_on_a_question_changes_nothing(tokenizer):
    talk = [ASKS | {"masked": True, "weight": 0}, WRONG | {"masked": True}, ASKS, SAYS | {"masked": False}]
    assert encoded(tokenizer, talk)[1] == "Low.<|im_end|>\n"


def test_a_system_message_that_stands_beside_the_messages_once_more_is_no_reason_against_a_row(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    text, _ = encoded(tokenizer, [system, ASKS, SAYS], system_prompt="Be brief.")
    assert text == encoded(tokenizer, [system, ASKS, SAYS])[0]


def test_a_row_with_no_answer_to_learn_is_dropped_and_said(tmp_path):
    folder = tmp_path / "model"
    byte_tokenizer(folder, CHATML, SPECIALS, SPECIALS[1:], SPECIALS[1])
    rows = [[ASKS, WRONG | {"weight": 0}], [ASKS, SAYS]]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in rows))
    said = load_splits(path=path, sequence_length=99, tokenizer_folder=folder).report
    assert any("1" in line and "dropped" in line for line in said), said


@pytest.mark.parametrize(
    ("messages", "more", "says"),
    [
        (
            [ASKS, SAYS | {"weight": 0.5}],
            {},
            r"message 2: 'weight' is 0\.5; a message is learnt \(1\) or not \(0\)",
        ),
        ([ASKS, SAYS | {"weight": "0"}], {}, "message 2: 'weight' is '0'"),
        ([ASKS, SAYS | {"train": -1}], {}, "message 2: 'train' is -1"),
        ([ASKS | {"train": True}, SAYS], {}, r"message 1 \(user\) asks to be learnt"),
        ([ASKS, SAYS | {"weight": 1, "train": False}], {}, "'weight' and 'train' disagree"),
        ([ASKS, SAYS | {"train_detail": [{"begin_offset": 0}]}], {}, "message 2: 'train_detail'"),
        (
            [ASKS, SAYS | {"content": [{"type": "text", "text": "L", "train": False}]}],
            {},
            "a part with 'train'",
        ),
        ([ASKS, SAYS], {"weight": 2.0}, r"'weight' is 2\.0; all rows count alike"),
        ([ASKS, SAYS], {"system": "Be brief."}, "'system' beside the messages"),
        ([ASKS, SAYS], {"system_prompt": "Be brief."}, "'system_prompt' beside the messages"),
        ([ASKS, SAYS], {"chat_template_kwargs": {"enable_thinking": False}}, "'chat_template_kwargs'"),
        (
            [{"from": "human", "value": "Tide?"}, SAYS],
            {},
            "message 1 has 'from' and 'value'; `mlx-empire inspect ",
        ),
        (
            [ASKS, {"role": "narrator", "content": "It rains."}, SAYS],
            {},
            "message 2: role 'narrator' is not known",
        ),
        (
            [ASKS, {"role": "function_call", "content": "{}"}],
            {},
            "role 'function_call'; write role assistant with",
        ),
        (
            [ASKS, SAYS | {"tool_responses": [{"name": "f", "response": {}}]}],
            {},
            "'tool_responses' are not the",
        ),
        (
            [ASKS, SAYS | {"function_call": CALL, "tool_calls": [CALL]}],
            {},
            "both 'function_call' and 'tool_calls'",
        ),
        ([ASKS | {"tool_calls": [CALL]}, SAYS], {}, r"message 1 \(user\) has 'tool_calls'"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, SAYS],
            {},
            "part of type 'image_url'",
        ),
        ([{"role": "user", "content": ["Tide?"]}, SAYS], {}, "other things than parts"),
        ([ASKS, SAYS | {"reasoning_content": "hm"}], {}, "message 2: .* does not print 'reasoning_content'"),
        (
            [ASKS, SAYS | {"reasoning": "a", "thinking": "b"}],
            {},
            "both 'reasoning' and 'thinking', which differ",
        ),
        ([ASKS, SAYS | {"thinking": ["hm"]}], {}, "'thinking' is a list; it must be a string"),
        ([ASKS | {"reasoning": "hm"}, SAYS], {}, r"message 1 \(user\) has 'reasoning'"),
        ([ASKS, {"role": "assistant"}], {}, r"message 2 \(assistant\) has no text"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_file_line_message_and_key(tokenizer, messages, more, says):
    with pytest.raises(UserError, match=rf"^train\.jsonl:7: ?.*{says}") as caught:
        encoded(tokenizer, messages, **more)
    assert "\n" not in str(caught.value)


def test_a_flag_needs_masking_and_the_line_says_so(tokenizer):
    with pytest.raises(UserError, match=r"^train\.jsonl:7: .*data\.mask_prompt: true"):
        encoded(tokenizer, [ASKS, WRONG | {"weight": 0}, ASKS, SAYS], mask_prompt=False)


def test_roles_under_other_names_are_the_same_conversation(tokenizer):
    standard = [{"role": "system", "content": "Be brief."}, ASKS, SAYS]
    for system, user, assistant in [
        ("developer", "human", "gpt"),
        ("System", "User", "Assistant"),
        ("system", "human", "model"),
        ("system", "USER", "chatbot"),
    ]:
        roles = (system, user, assistant)
        talk = [message | {"role": role} for message, role in zip(standard, roles, strict=True)]
        assert encoded(tokenizer, talk) == encoded(tokenizer, standard)


def test_a_role_that_the_template_knows_stays(tokenizer):
    """gpt-oss has developers, Granite documents: the template renders them otherwise than by name."""
    knows = (
        "{% for m in messages %}{% if m.role == 'developer' %}<dev>{{ m.content }}</dev>"
        "{% elif m.role == 'documents' %}<docs>{{ m.content }}</docs>"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}" + PROMPT
    )
    talk = [{"role": "developer", "content": "Short."}, {"role": "documents", "content": "Ebb."}, ASKS, SAYS]
    text, learnt = encoded(tokenizer, talk, knows)
    assert text.startswith("<dev>Short.</dev><docs>Ebb.</docs><|im_start|>user\nTide?")
    assert learnt == "Low.<|im_end|>\n"


def test_results_under_other_names_and_the_old_function_call_are_tool_calls(tokenizer):
    new = [
        ASKS,
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "name": "get_tide", "content": "low"},
        SAYS,
    ]
    schema = {"name": "get_tide", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": schema}]
    expected = encoded(tokenizer, new, TOOLS, tools=tools)
    assert expected[1] == '<call>get_tide {"harbour": "Bergen"}</call><|im_end|>\nLow.<|im_end|>\n'
    old_call = {"name": "get_tide", "arguments": json.dumps(CALL["arguments"])}
    for role in ("function", "observation", "ipython"):
        old = [
            ASKS,
            {"role": "assistant", "content": None, "function_call": old_call},
            new[2] | {"role": role},
            SAYS,
        ]
        assert encoded(tokenizer, old, TOOLS, functions=[schema]) == expected
    assert encoded(tokenizer, new, TOOLS, tools=json.dumps(tools)) == expected


@pytest.mark.parametrize("given", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("wanted", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_is_learnt_under_whichever_name_the_template_has_for_it(tokenizer, given, wanted):
    template = THINKS.replace("KEY", wanted)
    text, learnt = encoded(tokenizer, [ASKS, SAYS | {given: "Moon?"}, ASKS, SAYS], template)
    assert learnt == "<think>Moon?</think>Low.<|im_end|>\nLow.<|im_end|>\n"
    assert text.count("Moon?") == 1


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_answers_that_teach_to_stop_where_nobody_means_it_are_told(mask_prompt, tokenizer):
    remarks, end = Remarks(), "<|im_end|>"
    blank, within = SAYS | {"content": " "}, SAYS | {"content": f"Low{end} tide."}
    rows = ((SAYS, blank), (within, SAYS), (blank | {"weight": 0}, SAYS))
    for answers in rows if mask_prompt else rows[:2]:
        talk = [message for answer in answers for message in (ASKS, answer)]
        encoded(
            tokenizer,
            [*talk, ASKS | {"content": f"And {end}?"}],
            THINKS.replace("KEY", "reasoning"),
            mask_prompt,
            remarks=remarks,
        )
    turns = 5 if mask_prompt else 4
    assert (remarks.turns, remarks.silent, remarks.ending_within) == (turns, 1, 1)
    silent, within = remarks.sentences(tokenizer)
    assert f"1 of {turns} assistant turns say nothing" in silent
    assert f"1 of {turns} assistant turns spell an end-of-sequence token" in within


def test_thoughts_that_the_template_drops_and_keys_that_nothing_reads_are_told(tokenizer):
    remarks = Remarks()
    drops = THINKS.replace("m.KEY %}", "m.reasoning_content and loop.last %}").replace(
        "KEY", "reasoning_content"
    )
    talk = [
        ASKS,
        SAYS | {"reasoning": "Moon?"},
        ASKS | {"mood": "calm"},
        SAYS | {"reasoning": "Sun?", "name": "x"},
    ]
    assert (
        encoded(tokenizer, talk, drops, remarks=remarks)[1]
        == "Low.<|im_end|>\n<think>Sun?</think>Low.<|im_end|>\n"
    )
    assert (remarks.thoughts_unseen, dict(remarks.unread)) == (1, {"mood": 1})
    thoughts, keys = remarks.sentences(tokenizer)
    assert "drops 1 thoughts" in thoughts
    assert keys.endswith("the chat template included: 'mood' (1)")


PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{{ p.text }}{% endfor %}"
    + CLOSE
)
FIRST_PART = PARTS.replace(
    "{% for p in m.content %}{{ p.text }}{% endfor %}", "{{ m.content[0]['text'].strip() }}"
)


def test_text_and_lists_of_parts_reach_the_template_in_the_form_it_reads(tokenizer):
    listed = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in (ASKS, SAYS)]
    expected = encoded(tokenizer, [ASKS, SAYS])
    for template in (CHATML, PARTS, FIRST_PART):
        for talk in ([ASKS, SAYS], listed):
            assert encoded(tokenizer, talk, template) == expected


def test_a_system_message_that_the_template_leaves_out_is_refused(tokenizer):
    template = CHATML.replace("in messages %}", "in messages if m.role != 'system' %}")
    with pytest.raises(
        UserError, match=r"^train\.jsonl:7: message 1: the chat template does not print this content"
    ):
        encoded(tokenizer, [{"role": "system", "content": "Be brief."}, ASKS, SAYS], template)


GEMMA = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</call>{% endfor %}{% for r in m.tool_responses or [] %}<r>{{ r.response }}</r>"
    "{% endfor %}{{ m.content or '' }}" + CLOSE
)


def test_a_template_that_has_results_only_inside_the_answer_is_refused_with_what_to_do(tokenizer):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]}
    with pytest.raises(
        UserError, match=r"^train\.jsonl:7: .*tool_responses.*take this model's newer template"
    ):
        encoded(tokenizer, [ASKS, call, {"role": "tool", "content": "low"}, SAYS], GEMMA)
    assert encoded(tokenizer, [ASKS, SAYS], GEMMA)[1] == "Low.<|im_end|>\n"


def test_prompts_of_evaluation_sets_know_the_same_names(tokenizer):
    tokenizer.chat_template = CHATML
    standard = encode_prompt(tokenizer, RawRow("here:1", {}), [ASKS, SAYS, ASKS])
    other = [ASKS | {"role": "human"}, SAYS | {"role": "gpt", "weight": 0}, ASKS]
    assert encode_prompt(tokenizer, RawRow("here:1", {}), other) == standard
