"""The token that ends an answer is learnt with every answer, over the shapes that published templates have.

What is expected is put together by hand from the conversation, piece by piece: no template is read for it.
"""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load as load_with_mlx_lm
from support.byte_tokenizer import byte_tokenizer

from mlx_empire.data.chat import Remarks
from mlx_empire.data.encode import encode_rows, load_tokenizer
from mlx_empire.data.files import RawRow
from mlx_empire.data.rows import build_table
from mlx_empire.data.splits import load_splits

SPECIALS = (
    "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|end|>",
    "[INST]", "[/INST]",
)  # fmt: skip


class Shape:
    """A template, the tokens that end a sequence, and by hand: the text before a turn, after it, after the last."""

    def __init__(self, template, ends, start, user, assistant, closing, appended="", at_end="", trims=False):
        self.template, self.ends, self.start, self.trims = template, ends, start, trims
        self.header = {"user": user, "assistant": assistant}
        self.closing, self.appended, self.at_end = closing, appended, at_end

    def targets(self, messages) -> list[tuple[str, bool]]:
        """The pieces of the rendering in order, and which of them are learnt."""
        pieces = [(self.start, False)]
        for number, message in enumerate(messages):
            role, learnt = message["role"], message["role"] == "assistant"
            text = message["content"].strip() if self.trims else message["content"]
            header, marker = self.header[role], ""
            if number and messages[number - 1]["role"] == "assistant" and header.startswith(self.appended):
                header, marker = header.removeprefix(self.appended), self.appended
            pieces += [(marker, True), (header, False), (text, learnt), (self.closing[role], learnt)]
        learnt = messages[-1]["role"] == "assistant"
        return [*pieces, (self.at_end or (self.appended if learnt else ""), learnt)]


SHAPES = {
    "chatml": Shape(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|endoftext|>", "<|im_end|>"),
        "", "<|im_start|>user\n", "<|im_start|>assistant\n",
        {"user": "<|im_end|>\n", "assistant": "<|im_end|>\n"},
    ),
    "llama 3": Shape(
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
        "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|eot_id|>",),
        "<s>", "<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n",
        {"user": "<|eot_id|>", "assistant": "<|eot_id|>"},
        trims=True,
    ),
    # No turn is closed; the user's marker is an end-of-sequence token.
    "glm 4.5": Shape(
        "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
        "[gMASK]<sop>", "<|user|>\n", "<|assistant|>\n",
        {"user": "", "assistant": ""},
        appended="<|user|>",
    ),
    # The marker comes after a line break: both are what the model must write to stop.
    "marker on a line of its own": Shape(
        "<sop>{% for m in messages %}{{ '\n<|' + m.role + '|>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n<|assistant|>' }}{% endif %}",
        ("<|user|>",),
        "<sop>", "\n<|user|>", "\n<|assistant|>",
        {"user": "", "assistant": ""},
        appended="\n<|user|>",
    ),
    "mistral": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        ("</s>",),
        "<s>", "[INST]", "",
        {"user": "[/INST]", "assistant": "</s>"},
    ),
    # Closes each turn, and writes the tokenizer's end once more at the very end.
    "phi 3": Shape(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|end|>", "</s>"),
        "", "<|user|>\n", "<|assistant|>\n",
        {"user": "<|end|>\n", "assistant": "<|end|>\n"},
        at_end="</s>",
    ),
    # The next two stop nowhere: nothing that ends a turn is an end-of-sequence token.
    "solar": Shape(
        "{% for m in messages %}{{ '### ' + m.role | capitalize + ':\n' + m.content | trim + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}",
        ("</s>",),
        "", "### User:\n", "### Assistant:\n",
        {"user": "\n\n", "assistant": "\n\n"},
        trims=True,
    ),
    "falcon": Shape(
        "{% for m in messages %}{{ '\n\n' + m.role | capitalize + ': ' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n\nAssistant: ' }}{% endif %}",
        ("<|endoftext|>",),
        "", "\n\nUser: ", "\n\nAssistant: ",
        {"user": "", "assistant": ""},
    ),
}  # fmt: skip
ENDLESS = ("solar", "falcon")

# Any text: letters of all scripts, emoji, line breaks and brackets, but no name of a special token.
TEXTS = st.text(
    st.characters(exclude_categories=("Cs", "Co"), exclude_characters="|"), min_size=1, max_size=12
)
TEXTS = TEXTS.map(lambda text: f"a{text}z")
CONVERSATIONS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4).map(
    lambda pairs: [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    found = {name: root / str(number) for number, name in enumerate(SHAPES)}
    for name, shape in SHAPES.items():
        byte_tokenizer(found[name], shape.template, SPECIALS, shape.ends, "</s>", "<s>")
    return found


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


def encode(tokenizer, messages, mask_prompt=True, remarks=None, **more):
    row = RawRow("here:1", {"messages": messages, **more})
    (document,) = encode_rows([row], "chat", tokenizer, mask_prompt, None, remarks)
    return document


def by_hand(tokenizer, pieces) -> tuple[list[int], list[int]]:
    """Tokens and flags of pieces that are tokenised one by one: bytes and special tokens do not merge."""
    tokens, flags = [], []
    for text, learnt in pieces:
        ids = tokenizer.encode(text, add_special_tokens=False)
        tokens += ids
        flags += [int(learnt)] * len(ids)
    return tokens, flags


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=25, deadline=None)
@given(messages=CONVERSATIONS, question=st.booleans())
def test_the_targets_are_each_answer_with_its_stop_and_nothing_else(tokenizers, name, messages, question):
    if question:  # the last answer is followed by one more question
        messages = [*messages, {"role": "user", "content": "and?"}]
    remarks = Remarks()
    document = encode(tokenizers[name], messages, remarks=remarks)
    tokens, flags = by_hand(tokenizers[name], SHAPES[name].targets(messages))
    assert document.tokens.tolist() == tokens
    assert document.counted.tolist() == flags
    answers = sum(message["role"] == "assistant" for message in messages)
    assert (remarks.turns, remarks.endless) == (answers, answers if name in ENDLESS else 0)


@pytest.mark.parametrize("name", SHAPES)
def test_without_masking_the_last_answer_has_its_stop_too(tokenizers, name):
    messages = [{"role": "user", "content": "Tide?"}, {"role": "assistant", "content": "Low."}]
    document = encode(tokenizers[name], messages, mask_prompt=False)
    tokens, _ = by_hand(tokenizers[name], SHAPES[name].targets(messages))
    assert document.tokens.tolist() == tokens
    assert document.counted.tolist() == [0] + [1] * (len(tokens) - 1)


def test_the_marker_that_follows_a_call_is_its_stop(folders):
    """GLM: the model calls with <|observation|> to come, and answers with <|user|> to come; in both places each."""
    tokenizer = load_tokenizer(folders["glm 4.5"])
    tokenizer.chat_template = (
        "[gMASK]<sop>{% for m in messages %}"
        "{% if m.role == 'tool' %}{{ '<|observation|>\n' + m.content }}{% else %}{{ '<|' + m.role + '|>\n' }}"
        "{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}"
        "{{ '<call>' + c.function.name }}{% for k, v in c.function.arguments.items() %}{{ ' ' + k + '=' + v }}"
        "{% endfor %}{{ '</call>' }}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    call = {"id": "1", "function": {"name": "tide", "arguments": {"harbour": "Bergen"}}}
    talk = [
        {"role": "user", "content": "Tide?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "low", "tool_call_id": "1"},
        {"role": "assistant", "content": "Low."},
    ]
    called, answered = "<call>tide harbour=Bergen</call><|observation|>", "Low.<|user|>"
    assert targets(tokenizer, talk) == called + answered
    assert targets(tokenizer, talk[:2]) == called


def test_an_answer_after_a_forgotten_thought_has_its_stop(folders):
    """The last turn keeps its thought and would lose it with one more question: the marker is found all the same."""
    tokenizer = load_tokenizer(folders["glm 4.5"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if loop.last %}{{ m.content }}"
        "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    thought = [
        {"role": "user", "content": "Tide?"},
        {"role": "assistant", "content": "<think>hm</think>Low."},
    ]
    assert targets(tokenizer, thought) == "<think>hm</think>Low.<|user|>"
    assert targets(tokenizer, thought + thought) == "Low.<|user|><think>hm</think>Low.<|user|>"


def targets(tokenizer, messages) -> str:
    document = encode(tokenizer, messages)
    return tokenizer.decode(document.tokens[document.counted == 1].tolist())


def test_a_row_that_is_cut_loses_its_stop_and_gets_no_other(tokenizers):
    shape, tokenizer = SHAPES["glm 4.5"], tokenizers["glm 4.5"]
    talk = [{"role": "user", "content": "Tide?"}, {"role": "assistant", "content": "Low at six."}]
    tokens, flags = by_hand(tokenizer, shape.targets(talk))
    for length in range(10, len(tokens) + 2):
        table, _ = build_table([encode(tokenizer, talk)], length, False, False)
        if table is not None:
            assert table.tokens.tolist() == tokens[: length + 1]
            assert table.counted.tolist() == flags[: length + 1]


@pytest.mark.parametrize("name", SHAPES)
def test_a_template_that_stops_nowhere_is_told_before_training(name, folders, tmp_path):
    path = tmp_path / "train.jsonl"
    talk = [{"role": "user", "content": "Tide?"}, {"role": "assistant", "content": "Low."}]
    path.write_text(json.dumps({"messages": talk}))
    folder = folders[name]
    told = load_splits(path=path, sequence_length=99, tokenizer_folder=folder).warnings
    if name in ENDLESS:
        (line,) = told
        assert line.startswith("WARNING: 1 of 1 assistant turns end without an end-of-sequence token (")
        assert SHAPES[name].ends[0] in line
        assert f"the chat template of {folder} writes none" in line
        assert "eos_token_id in generation_config.json" in line
    else:
        assert told == []


def test_what_is_taught_as_a_stop_stops_generation_here_and_in_mlx_lm(tmp_path, fixtures):
    """generation_config.json goes before config.json, in `mlx_lm.load` and here; the tokenizer's own is there too."""
    model = tmp_path / "model"
    shutil.copytree(fixtures / "tiny-llama-260k", model)
    for config, generation in (([5, 7], [7, 9]), (11, None), (None, 13), ([5], "nonsense"), (None, None)):
        content = json.loads((fixtures / "tiny-llama-260k" / "config.json").read_text())
        content.pop("eos_token_id", None)
        if config is not None:
            content["eos_token_id"] = config
        (model / "config.json").write_text(json.dumps(content))
        (model / "generation_config.json").unlink(missing_ok=True)
        if generation is not None:
            text = generation if isinstance(generation, str) else json.dumps({"eos_token_id": generation})
            (model / "generation_config.json").write_text(text)
        assert load_tokenizer(model).eos_token_ids == load_with_mlx_lm(str(model))[1].eos_token_ids
