"""Tool calls and results over the shapes of published templates: printed as the template means it, or refused."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.byte_tokenizer import byte_tokenizer

from mlx_empire.data.chat import Remarks
from mlx_empire.data.encode import encode_prompt, encode_rows, load_tokenizer
from mlx_empire.data.files import RawRow
from mlx_empire.data.splits import load_splits
from mlx_empire.errors import UserError

PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
OPEN, CLOSE = "<|im_start|>{{ m.role }}\n", "<|im_end|>\n{% endfor %}" + PROMPT
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
# Prints content and nothing else.
PLAIN = "{% for m in messages %}" + OPEN + "{{ m.content or '' }}" + CLOSE
# Qwen, Llama 3.1, Hermes: an object as JSON; calls nested or flat; content before them.
JSON = (
    TOOLS + OPEN + "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{% set f = c.function or c %}"
    '<call>{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}</call>{% endfor %}' + CLOSE
)
# DeepSeek V3: a JSON string, joined as it is; content must be a string.
STRING = (
    TOOLS + OPEN + "{{ '' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + '\n' + c.function.arguments + '</call>' }}{% endfor %}" + CLOSE
)
# As it is, but an object comes out as Python writes it.
RAW = (
    TOOLS + OPEN + "{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments }}</call>{% endfor %}" + CLOSE
)
# Qwen 3 Coder and GLM 4.5: each argument on its own, other values than strings as JSON.
ONE_BY_ONE = (
    TOOLS + OPEN + "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v if v is string else v | tojson }}{% endfor %}"
    "</call>{% endfor %}" + CLOSE
)
# Llama 3.1: a call in place of the content. gpt-oss: of several calls only the first.
INSTEAD = (
    TOOLS
    + OPEN
    + (
        "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}"
        + CLOSE
    )
)
# The generation prompt opens a thought that calls do not have; what opens the call is the model's.
THINKING = JSON.replace(PROMPT, PROMPT.replace("assistant\n", "assistant\n<think>\n"))
NO_RESULTS = JSON.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
HIDDEN = "{% for m in messages %}" + OPEN + "{% for part in m.parts %}{{ part.text }}{% endfor %}" + CLOSE

SCHEMA = [{"type": "function", "function": {"name": "get_tide", "parameters": {"type": "object"}}}]
QUESTION = {"role": "user", "content": "Tide?"}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "get_tide", "content": "low"}
ANSWER = {"role": "assistant", "content": "It is low."}
ARGUMENTS = {"harbour": 'Bergen "B"', "days": 3, "deep": True}
AS_JSON = '{"harbour": "Bergen \\"B\\"", "days": 3, "deep": true}'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools") / "model"
    return byte_tokenizer(folder, PLAIN, ("<|im_start|>", "<|im_end|>"), ("<|im_end|>",), "<|im_end|>")


def calling(arguments, content=None, flat=False, **more):
    function = {"name": "get_tide", "arguments": arguments}
    call = function if flat else {"id": "c1", "type": "function", "function": function}
    return {"role": "assistant", "content": content, "tool_calls": [call], **more}


def learnt(tokenizer, template, messages, tools=None, remarks=None) -> list[str]:
    """The decoded runs of targets, their closing aside."""
    tokenizer.chat_template = template
    row = RawRow("here:7", {"messages": messages, "tools": tools})
    (document,) = encode_rows([row], "chat", tokenizer, True, None, remarks)
    text = tokenizer.decode(document.tokens[document.counted == 1].tolist())
    *answers, rest = text.split("<|im_end|>\n")
    assert rest == ""
    return answers


@pytest.mark.parametrize("given_as", [dict, str])
@pytest.mark.parametrize(
    ("template", "printed"),
    [
        (JSON, '<call>{"name": "get_tide", "arguments": ' + AS_JSON + "}</call>"),
        (THINKING, '<call>{"name": "get_tide", "arguments": ' + AS_JSON + "}</call>"),
        (STRING, "<call>get_tide\n" + AS_JSON + "</call>"),
        (RAW, "<call>get_tide " + AS_JSON + "</call>"),
        (ONE_BY_ONE, '<call>get_tide<harbour>Bergen "B"<days>3<deep>true</call>'),
        (INSTEAD, '{"name": "get_tide", "arguments": ' + AS_JSON + "}"),
    ],
)
def test_arguments_come_out_as_the_template_means_them(tokenizer, template, printed, given_as):
    """Never escaped twice and never as Python writes an object, whether the row has an object or a JSON string."""
    arguments = ARGUMENTS if given_as is dict else json.dumps(ARGUMENTS)
    messages = [QUESTION, calling(arguments), RESULT, ANSWER]
    assert learnt(tokenizer, template, messages, SCHEMA) == [printed, "It is low."]
    assert learnt(tokenizer, template, messages[:2], SCHEMA) == [printed]


def test_flat_calls_and_content_beside_a_call_are_learnt(tokenizer):
    call = '<call>{"name": "get_tide", "arguments": ' + AS_JSON + "}</call>"
    messages = [QUESTION, calling(json.dumps(ARGUMENTS), flat=True)]
    assert learnt(tokenizer, JSON, messages) == [call]
    assert learnt(tokenizer, JSON, [QUESTION, calling(ARGUMENTS, "Let me see.")]) == ["Let me see." + call]
    two = calling(ARGUMENTS)
    two["tool_calls"] = two["tool_calls"] * 2
    assert learnt(tokenizer, JSON, [QUESTION, two]) == [call * 2]


def test_a_name_that_stands_in_the_calls_id_alone_is_printed_there(tokenizer):
    """Kimi K2 prints ids such as functions.get_tide:0, and no name."""
    by_id = JSON.replace('"name": "{{ f.name }}"', '"id": "{{ c.id }}"')
    named, other = calling(ARGUMENTS), calling(ARGUMENTS)
    named["tool_calls"][0]["id"] = "functions.get_tide:0"
    expected = '<call>{"id": "functions.get_tide:0", "arguments": ' + AS_JSON + "}</call>"
    assert learnt(tokenizer, by_id, [QUESTION, named]) == [expected]
    with pytest.raises(UserError, match="does not print the call of 'get_tide'"):
        learnt(tokenizer, by_id, [QUESTION, other])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=("Cs", "Co"))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_é"), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(arguments=st.dictionaries(st.text("abc_é", min_size=1), VALUES, max_size=3), as_string=st.booleans())
@pytest.mark.parametrize("template", [JSON, STRING, RAW])
def test_any_arguments_can_be_read_back_from_the_targets(tokenizer, template, arguments, as_string):
    given_as = json.dumps(arguments) if as_string else arguments
    (call,) = learnt(tokenizer, template, [QUESTION, calling(given_as)])
    found = re.fullmatch(
        r'<call>(?:\{"name": "get_tide", "arguments": |get_tide\s)(.*?)\}?</call>', call, re.DOTALL
    )
    text = found[1] + ("" if template is JSON else "}")
    assert json.loads(text) == arguments


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        (PLAIN, [QUESTION, calling(ARGUMENTS)], "message 2: .* does not print the call of 'get_tide'"),
        (PLAIN, [QUESTION, calling({})], "message 2: .* does not print the call of 'get_tide'"),
        (PLAIN, [QUESTION, ANSWER | {"function_call": {"name": "f", "arguments": "{}"}}], "the call of 'f'"),
        (JSON.replace("f.name", "'x'"), [QUESTION, calling({})], "does not print the call"),
        (JSON.replace("f.arguments", "{}"), [QUESTION, calling({})], "does not print the call"),
        (
            JSON.replace("f.arguments", "f.arguments.harbour"),
            [QUESTION, calling(ARGUMENTS)],
            "not print the call",
        ),
        (
            JSON.replace("f.arguments", "('' + f.arguments)"),
            [QUESTION, calling(ARGUMENTS)],
            "not print the call",
        ),
        (INSTEAD, [QUESTION, calling(ARGUMENTS, "Let me see.")], "message 2: .* drops the content beside it"),
        (
            INSTEAD,
            [QUESTION, {**ANSWER, "content": "", "tool_calls": calling({})["tool_calls"] * 2}],
            "message 2: .* does not print the call",
        ),
        (NO_RESULTS, [QUESTION, calling({}), RESULT, ANSWER], r"message 3: .*this result \(role tool\)"),
        (HIDDEN, [QUESTION, ANSWER], "message 1: the chat template does not print this content"),
        (HIDDEN, [QUESTION, calling({}), RESULT], "message 2: .* does not print the call"),
        (JSON, [QUESTION, calling('{"harbour": ')], "message 2: the arguments of 'get_tide' are not JSON"),
        (
            JSON,
            [QUESTION, calling('"twice"')],
            "message 2: the arguments of 'get_tide' are a str, not an object",
        ),
        (JSON, [QUESTION, calling([1])], "are a list, not an object; write {} for none"),
        (JSON, [QUESTION, calling(None)], "are missing, not an object"),
        (JSON, [QUESTION, ANSWER | {"tool_calls": "get_tide()"}], "message 2: 'tool_calls' must be a list"),
        (
            JSON,
            [QUESTION, ANSWER | {"tool_calls": [{"id": "1"}]}],
            "message 2: a tool call has no function name",
        ),
    ],
)
def test_what_the_template_does_not_print_is_refused_by_file_line_and_message(
    tokenizer, template, messages, says
):
    for mask_prompt in (True, False):
        tokenizer.chat_template = template
        row = RawRow("train.jsonl:7", {"messages": messages, "tools": SCHEMA})
        with pytest.raises(UserError, match=rf"^train\.jsonl:7: .*{says}|^train\.jsonl:7: {says}") as caught:
            list(encode_rows([row], "chat", tokenizer, mask_prompt, None))
        assert "\n" not in str(caught.value)


def test_arguments_nested_without_end_are_refused_in_one_line(tokenizer):
    deep: dict = {}
    for _ in range(900):
        deep = {"a": deep}
    with pytest.raises(UserError, match=r"^here:7: .*(nested too deeply|refuses this conversation)"):
        learnt(tokenizer, JSON, [QUESTION, calling(deep)])


def test_tools_that_are_not_printed_are_told_before_training(tokenizer, tmp_path):
    remarks = Remarks()
    assert learnt(tokenizer, JSON, [QUESTION, ANSWER], SCHEMA, remarks) == ["It is low."]
    assert remarks.tools_unseen == 0
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"messages": [QUESTION, ANSWER], "tools": SCHEMA}) + "\n")
    folder = tmp_path / "model"
    byte_tokenizer(folder, PLAIN, ("<|im_start|>", "<|im_end|>"), ("<|im_end|>",), "<|im_end|>")
    (line,) = load_splits(path=path, sequence_length=99, tokenizer_folder=folder).warnings
    assert "does not print the 'tools' of 1 rows" in line


def test_prompts_of_evaluation_sets_are_rendered_as_training_rows_are(tokenizer):
    """What the model is asked is the head of what it learnt: tools, calls and results included."""
    tokenizer.chat_template = JSON
    messages = [QUESTION, calling(json.dumps(ARGUMENTS)), RESULT, ANSWER]
    row = RawRow("here:7", {"messages": messages, "tools": SCHEMA})
    (document,) = encode_rows([row], "chat", tokenizer, True, None)
    tokens = document.tokens.tolist()
    prompt = encode_prompt(tokenizer, row, messages[:3])
    assert tokens[: len(prompt)] == prompt
    assert tokenizer.decode(tokens[len(prompt) :]) == "It is low.<|im_end|>\n"


def test_of_named_templates_default_is_used_and_with_tools_tool_use(tmp_path):
    named = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": JSON}]
    specials = ("<|im_start|>", "<|im_end|>")
    tokenizer = byte_tokenizer(tmp_path / "both", named, specials, specials[1:], specials[1])
    for template, tools in ((PLAIN, None), (JSON, SCHEMA)):
        row = RawRow("here:1", {"messages": [QUESTION, ANSWER], "tools": tools})
        (found,) = encode_rows([row], "chat", tokenizer, True, None)
        alone = byte_tokenizer(tmp_path / "alone", template, specials, specials[1:], specials[1])
        (expected,) = encode_rows([row], "chat", alone, True, None)
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.counted.tolist() == expected.counted.tolist()


def test_a_folder_of_named_templates_is_read_beside_the_default(tmp_path):
    """Beside additional_chat_templates/, transformers reads the default from chat_template.jinja alone."""
    specials, folder = ("<|im_start|>", "<|im_end|>"), tmp_path / "model"
    byte_tokenizer(folder, PLAIN, specials, specials[1:], specials[1])
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(JSON)
    rows = [RawRow("here:1", {"messages": [QUESTION, ANSWER], "tools": tools}) for tools in (SCHEMA, None)]
    with pytest.raises(
        UserError, match=r"\(tool_use\) is named default; .* write it into chat_template\.jinja"
    ):
        list(encode_rows(rows[1:], "chat", load_tokenizer(folder), True, None))
    (folder / "chat_template.jinja").write_text(PLAIN)
    found = load_tokenizer(folder)
    with_tools, without = (
        found.decode(d.tokens.tolist()) for d in encode_rows(rows, "chat", found, True, None)
    )
    assert with_tools == json.dumps(SCHEMA) + without


@pytest.mark.parametrize("names", [("rag", "tool"), ()])
def test_named_templates_without_a_default_are_refused_in_one_line(names, tmp_path):
    specials = ("<|im_start|>", "<|im_end|>")
    named = [{"name": name, "template": PLAIN} for name in names]
    tokenizer = byte_tokenizer(tmp_path / "model", named, specials, specials[1:], specials[1])
    row = RawRow("here:1", {"messages": [QUESTION, ANSWER]})
    with pytest.raises(
        UserError, match=r"^here:1: none of the tokenizer's chat templates \(.*\) is named default"
    ):
        list(encode_rows([row], "chat", tokenizer, True, None))
