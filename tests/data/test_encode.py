"""BOS, EOS, prompts and vocabulary: what a row's tokens and targets are."""

import json
import shutil
from pathlib import Path

import pytest
from mlx_lm.tuner.datasets import TextDataset

from mlx_empire.data.encode import check_tokenizer, encode_prompt, encode_rows, load_tokenizer
from mlx_empire.data.files import RawRow, locate
from mlx_empire.errors import UserError


def changed_tokenizer(source: Path, target: Path, adds: str = "", **config: str | None) -> Path:
    """A copy of the small tokenizer with other settings (None: without); it `adds` "bos" or "bos eos"."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((target / "tokenizer_config.json").read_text()) | config
    settings = {key: value for key, value in settings.items() if value is not None}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    if adds:
        names = {"<|endoftext|>": 0, "<|im_end|>": 2}
        bos, eos = ({"SpecialToken": {"id": name, "type_id": 0}} for name in names)
        single = [bos, {"Sequence": {"id": "A", "type_id": 0}}] + ([eos] if "eos" in adds else [])
        content = json.loads((target / "tokenizer.json").read_text())
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in names.items()},
        }
        (target / "tokenizer.json").write_text(json.dumps(content))
    return target


def encode(value: dict, data_format: str, tokenizer, mask_prompt: bool = True):
    (document,) = encode_rows([RawRow("here:1", value)], data_format, tokenizer, mask_prompt, None)
    return document.tokens.tolist(), document.counted.tolist()


def test_text_agrees_with_mlx_lm_and_decodes_to_itself(fixtures, tokenizer):
    rows = list(locate(fixtures / "speeches")[0].rows())[:50]
    theirs = TextDataset([row.value for row in rows], tokenizer)
    for ours, row in zip(encode_rows(rows, "text", tokenizer, True, 512), rows, strict=True):
        assert ours.tokens.tolist() == theirs.process(row.value)[0]
        assert tokenizer.decode(ours.tokens[:-1].tolist()) == row.value["text"]
        assert ours.tokens[-1] == tokenizer.eos_token_id
        assert ours.counted.tolist() == [0] + [1] * (len(ours.tokens) - 1)


def test_bos_is_there_when_the_tokenizer_adds_it_and_never_twice_in_a_chat(tokenizer_folder, tmp_path):
    tokenizer = load_tokenizer(changed_tokenizer(tokenizer_folder, tmp_path / "bos", adds="bos"))
    tokens, counted = encode({"text": "All men"}, "text", tokenizer)
    assert tokens[0] == tokenizer.bos_token_id == 0
    assert counted == [0] + [1] * (len(tokens) - 1)
    chat, _ = encode({"messages": [{"role": "user", "content": "Hello"}]}, "chat", tokenizer)
    assert 0 not in chat


@pytest.mark.parametrize("adds", ["", "bos", "bos eos"])
def test_a_bos_or_an_end_that_stands_there_is_not_doubled(adds, tokenizer_folder, tmp_path):
    """A text that a template rendered before has its own; what the tokenizer adds is not added again."""
    folder = changed_tokenizer(tokenizer_folder, tmp_path / "model", adds=adds, chat_template=None)
    tokenizer = load_tokenizer(folder)
    bos = "<|endoftext|>"
    plain, counted = encode({"text": "Done."}, "text", tokenizer)
    assert plain.count(0) == bool(adds)
    assert encode({"text": "Done.<|im_end|>"}, "text", tokenizer) == (plain, counted)
    if adds:
        assert encode({"text": bos + "Done."}, "text", tokenizer) == (plain, counted)
        assert encode({"text": bos + "Done.<|im_end|>"}, "text", tokenizer) == (plain, counted)
    asked = {"prompt": "Two and two is", "completion": " four."}
    tokens, flags = encode(asked, "completions", tokenizer)
    whole = {"prompt": bos * bool(adds) + asked["prompt"], "completion": " four.<|im_end|>"}
    assert encode(whole, "completions", tokenizer) == (tokens, flags)
    prompt = [{"role": "user", "content": whole["prompt"]}]
    assert encode_prompt(tokenizer, RawRow("here:1", {}), prompt) == tokens[: flags.index(1)]


def test_a_bos_is_never_a_target_but_where_it_ends_documents_too(tokenizer_folder, tmp_path):
    """Several documents in one text: the second begins with a BOS, which follows the first's end by no rule that
    could be learnt. GPT-2's one token is BOS and EOS: there it is the first's end."""
    text = "<|endoftext|>All men<|im_end|><|endoftext|>are created"
    for data_format, value in (
        ("text", {"text": text}),
        ("completions", {"prompt": text[:20], "completion": text[20:]}),
    ):
        folder = changed_tokenizer(tokenizer_folder, tmp_path / data_format, adds="bos", chat_template=None)
        tokenizer = load_tokenizer(folder)
        for mask_prompt in (True, False):
            tokens, counted = encode(value, data_format, tokenizer, mask_prompt)
            assert tokens.count(0) == 2
            assert [count for token, count in zip(tokens, counted, strict=True) if token == 0] == [0, 0]
            assert counted[tokens.index(2)] == 1
            assert counted[-1] == 1
    folder = changed_tokenizer(
        tokenizer_folder,
        tmp_path / "gpt2",
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        chat_template=None,
    )
    tokens, counted = encode({"text": "All men<|endoftext|>are"}, "text", load_tokenizer(folder))
    assert tokens.count(0) == 2
    assert counted == [0] + [1] * (len(tokens) - 1)


def test_a_bos_within_a_conversation_is_no_target(tokenizer_folder, tmp_path):
    """Llama 2 begins every pair of turns with one."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|endoftext|>[INST] {{ m.content }} [/INST]"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    tokenizer = load_tokenizer(
        changed_tokenizer(tokenizer_folder, tmp_path / "model", chat_template=template)
    )
    talk = [{"role": role, "content": "All men"} for role in ("user", "assistant") * 2]
    tokens, counted = encode({"messages": talk}, "chat", tokenizer, mask_prompt=False)
    assert tokens.count(0) == 2
    assert [c for t, c in zip(tokens, counted, strict=True) if t == 0] == [0, 0]
    assert sum(counted) == len(tokens) - 2
    tokens, counted = encode({"messages": talk}, "chat", tokenizer)
    assert tokenizer.decode([t for t, c in zip(tokens, counted, strict=True) if c]) == "All men<|im_end|>" * 2


@pytest.mark.parametrize("adds", ["bos", "bos eos"])
def test_completions_without_a_template_are_joined_and_end(adds, tokenizer_folder, tmp_path):
    folder = changed_tokenizer(tokenizer_folder, tmp_path / "base", adds=adds, chat_template=None)
    tokenizer = load_tokenizer(folder)
    tokens, counted = encode({"prompt": "Two and two is", "completion": " four."}, "completions", tokenizer)
    prompt = [0, *tokenizer.encode("Two and two is", add_special_tokens=False)]
    assert tokenizer.decode(tokens[1:-1]) == "Two and two is four."
    assert tokens[0] == 0
    assert tokens[-1] == tokenizer.eos_token_id
    assert counted == [0] * len(prompt) + [1] * (len(tokens) - len(prompt))
    _, unmasked = encode({"prompt": "Two", "completion": " is"}, "completions", tokenizer, mask_prompt=False)
    assert unmasked == [0] + [1] * (len(unmasked) - 1)


def test_a_completion_of_one_character_is_learned(tokenizer_folder, tmp_path):
    tokenizer = load_tokenizer(changed_tokenizer(tokenizer_folder, tmp_path / "base", chat_template=None))
    tokens, counted = encode({"prompt": "We thank the people", "completion": "."}, "completions", tokenizer)
    targets = [token for token, count in zip(tokens, counted, strict=True) if count]
    assert tokenizer.decode(targets) == ".<|im_end|>"


def test_a_word_that_begins_with_the_prompts_last_space_is_learned(tokenizer_folder, tmp_path):
    tokenizer = load_tokenizer(changed_tokenizer(tokenizer_folder, tmp_path / "base", chat_template=None))
    tokens, counted = encode({"prompt": "We thank ", "completion": "the people"}, "completions", tokenizer)
    targets = [token for token, count in zip(tokens, counted, strict=True) if count]
    assert tokenizer.decode(targets) == " the people<|im_end|>"


def test_tokens_are_taken_as_they_are():
    assert encode({"tokens": [7, 0, 5]}, "tokens", None) == ([7, 0, 5], [0, 1, 1])
    assert encode({"tokens": []}, "tokens", None) == ([], [])


def test_an_empty_text_is_no_document_of_one_end_token(tokenizer):
    assert encode({"text": ""}, "text", tokenizer) == ([], [])


def test_a_tokenizer_larger_than_the_model_is_refused_by_line(tokenizer):
    rows = [RawRow("a.jsonl:1", {"text": "!"}), RawRow("a.jsonl:2", {"text": "the people"})]
    with pytest.raises(
        UserError, match=r"^a\.jsonl:2: token id \d+ is outside the model's vocabulary of 100;"
    ):
        list(encode_rows(rows, "text", tokenizer, True, 100))


def test_a_tokenizer_without_template_or_end_is_refused_with_a_remedy(tokenizer_folder, tmp_path):
    base = load_tokenizer(changed_tokenizer(tokenizer_folder, tmp_path / "base", chat_template=None))
    with pytest.raises(UserError, match=r"no chat template; add chat_template\.jinja"):
        check_tokenizer("chat", base, tmp_path / "base")
    check_tokenizer("completions", base, tmp_path / "base")
    endless = load_tokenizer(changed_tokenizer(tokenizer_folder, tmp_path / "endless", eos_token=None))
    with pytest.raises(UserError, match=r"has no eos_token"):
        check_tokenizer("text", endless, tmp_path / "endless")
    check_tokenizer("chat", endless, tmp_path / "endless")


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for folder in (None, tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match=r"^model\.path ") as caught:
            load_tokenizer(folder)
        assert "\n" not in str(caught.value)
