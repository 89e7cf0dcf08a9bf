"""A finished result answers as mlx-lm alone lets it answer, alone or beside its base, and never with a traceback."""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import save_model
from rich.console import Console
from rich.live import Live
from support.our_families import config_of, weight
from support.speaking import MODEL, answers, finish, write_adapter
from support.tiny_models import tiny_config, tiny_model

from mlx_empire.chat import talk
from mlx_empire.chat.command import read
from mlx_empire.chat.talk import Speaker, side_by_side, speakers_of
from mlx_empire.checkpoint.manifest import sampled_digest
from mlx_empire.cli import main as cli
from mlx_empire.errors import UserError
from mlx_empire.model.build import build_model
from mlx_empire.model.config import complete
from mlx_empire.run.resident import load_model, speaking_with
from mlx_empire.serve.people import people_in

QUESTIONS = ("Tom said", "Once upon a time")
TOKENS = 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter's run, a full one's (which is the base, under another name), and one that is not finished."""
    folder = tmp_path_factory.mktemp("chat")
    for name in ("alice", "begun"):
        write_adapter(folder / name / "final", seed=100)
        finish(folder / name)
    (folder / "begun/COMPLETE").unlink()
    shutil.copytree(MODEL, folder / "whole/final")
    finish(folder / "whole")
    return folder


def said(question: str, adapter: Path | None) -> str:
    """What mlx-lm alone says."""
    return answers([question], adapter, TOKENS, chat=True)[0]


def asked(words: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What the command prints where every line of its input is a question."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n".join(QUESTIONS) + "\n"))
    assert cli(["chat", *map(str, words), "--max-tokens", str(TOKENS)]) == 0
    return capsys.readouterr().out.splitlines()


def test_every_line_is_answered_by_both_sides_as_mlx_lm_answers(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alice = runs / "alice"
    lines = [f"> {q}\nbase: {said(q, None)}\n{alice}: {said(q, alice / 'final')}" for q in QUESTIONS]
    assert lines[0].count("\n") == 2
    assert asked([alice, "--against", "base"], monkeypatch, capsys) == "\n".join(lines).splitlines()


def test_a_full_result_and_an_adapters_folder_answer_too(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, final = runs / "whole", runs / "alice/final"
    assert asked([whole], monkeypatch, capsys)[1] == f"{whole}: {said(QUESTIONS[0], None)}"
    lines = asked([final, "--against", whole], monkeypatch, capsys)
    assert lines[2] == f"{final}: {said(QUESTIONS[0], final)}"


@pytest.mark.slow  # it compiles a sampler
def test_sampling_is_by_temperature_and_seed(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [runs / "alice", "--temp", 1.5]
    first, again, other = (asked([*words, "--seed", s], monkeypatch, capsys) for s in (1, 1, 2))
    assert first == again != other


def test_the_base_is_held_once_and_never_changed(runs: Path) -> None:
    base = load_model(MODEL)
    tokens = mx.array([[1, 5, 9]])
    before = base.model(tokens)
    tuned = speaking_with(base, runs / "alice/final")
    assert not mx.array_equal(tuned.model(tokens), before)
    assert mx.array_equal(base.model(tokens), before)
    held = {id(array) for _, array in tree_flatten(base.model.parameters())}
    own = [name for name, array in tree_flatten(tuned.model.parameters()) if id(array) not in held]
    assert own
    assert all(name.endswith((".lora_a", ".lora_b")) for name in own)


def test_two_answers_grow_side_by_side(runs: Path) -> None:
    options = read([str(runs / "alice"), "--against", "base", "--max-tokens", str(TOKENS)])
    speakers = speakers_of(options)
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    side_by_side(speakers, QUESTIONS[0], options, console)
    assert [speaker.said[-1]["content"] for speaker in speakers] == [
        said(QUESTIONS[0], adapter) for adapter in (None, runs / "alice/final")
    ]
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "base" in shown
    assert "alice" in shown


def uncompiled(temp: float, top_p: float) -> Callable[[mx.array], mx.array]:
    """A sampler that takes no seconds to compile."""
    assert top_p == 1
    return lambda scores: mx.random.categorical(scores / temp)


def test_beside_another_each_is_sampled_as_if_it_were_alone(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one ends before the other, and the other goes on."""
    monkeypatch.setattr(talk, "make_sampler", uncompiled)
    words = ["--against", "base", "--temp", "1.5", "--seed", "3", "--max-tokens", str(TOKENS)]
    options = read([str(runs / "alice"), *words])
    together = speakers_of(options)
    for short in (None, 0, 1):
        found = [Speaker(one.name, one.resident) for one in together]
        alone = [Speaker(one.name, one.resident) for one in together]
        if short is not None:
            for side in (found, alone):
                side[short] = Brief(side[short].name, side[short].resident)
        side_by_side(found, QUESTIONS[0], options, Console(file=io.StringIO(), force_terminal=True))
        for one in alone:
            list(one.answers(QUESTIONS[0], options))
        assert [one.said for one in found] == [one.said for one in alone]
    greedy = [said(QUESTIONS[0], adapter) for adapter in (None, runs / "alice/final")]
    assert [one.said[-1]["content"] for one in found] != greedy


class Brief(Speaker):
    """One whose answers have three tokens."""

    def answers(self, question: str, options: argparse.Namespace) -> Iterator[str]:
        return super().answers(question, argparse.Namespace(**{**vars(options), "max_tokens": 3}))


class Rehearsed(Speaker):
    """One that says the same lines to everything, each shown before the next."""

    shown: Live

    def answers(self, question: str, options: argparse.Namespace) -> Iterator[str]:
        for number in range(20):
            yield f"line {number}\n"
            self.shown.refresh()


def test_an_answer_longer_than_the_terminal_is_shown_whole_once(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal goes back over what it shows and no further: what is redrawn must fit."""
    height = 8
    resident = load_model(MODEL)
    speakers = [Rehearsed("[bold]a[/bold]", resident), Rehearsed("b", resident)]

    class Seen(Live):
        def __init__(self, *words: Any, **options: Any) -> None:
            super().__init__(*words, **options)
            Rehearsed.shown = self

    monkeypatch.setattr(talk, "Live", Seen)
    console = Console(file=io.StringIO(), width=60, height=height, force_terminal=True, color_system=None)
    side_by_side(speakers, "?", read([str(runs / "alice")]), console)
    frames = re.split(r"\r?\x1b\[2K(?:\x1b\[1A\x1b\[2K)*", console.file.getvalue())  # type: ignore[attr-defined]
    *growing, whole = [frame for frame in frames if "line" in frame]
    assert len(growing) > 10
    assert max(frame.count("\n") for frame in growing) < height
    assert whole.count("line 19") == 2
    assert "[bold]a[/bold]" in whole, "a name is no markup"


def test_an_adapter_of_other_weights_does_not_answer(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "alice", tmp_path / "alice")
    plan = tmp_path / "alice/plan.json"
    plan.write_text(json.dumps({"base_digest": sampled_digest(MODEL)}))
    speakers_of(read([str(tmp_path / "alice")]))
    plan.write_text(json.dumps({"base_digest": "of other weights"}))
    with pytest.raises(SystemExit) as ended:
        cli(["chat", str(tmp_path / "alice"), "--against", "base"])
    assert ended.value.code == 64
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert (
        f"RUN: {tmp_path}/alice: was trained on other weights than those in {MODEL}; name its base by" in said
    )


def test_an_adapter_of_a_packed_base_speaks_on_it_packed_alike_and_on_no_other(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As its model card says, by `export base`; served too, and on one that does not say what it was made from."""
    run = tmp_path / "people/alice"
    shutil.copytree(runs / "alice", run)
    told = json.loads((run / "recipe.yaml").read_text())
    (run / "plan.json").write_text(json.dumps({"base_digest": sampled_digest(MODEL)}))
    for bits in ("4", "8"):
        assert cli(["export", "base", str(MODEL), str(tmp_path / bits), "--bits", bits]) == 0

    def speaks(kind: str, base: str) -> bool:
        (run / "recipe.yaml").write_text(json.dumps({**told, "tuning": {"type": kind}}))
        served = people_in(run.parent, tmp_path / base).names == ["alice"]
        with suppress(UserError):
            assert speakers_of(read([str(run), "--model", str(tmp_path / base)]))
            return served
        assert not served
        return False

    assert [speaks(kind, base) for kind, base in (("qlora", "4"), ("qlora", "8"), ("lora", "4"))] == [
        True,
        False,
        False,
    ]
    record = json.loads((tmp_path / "4/EXPORT.json").read_text())
    other = {"packed_from": {**record["packed_from"], "base_digest": "of others"}}
    (tmp_path / "4/EXPORT.json").write_text(json.dumps(record | other))
    assert not speaks("qlora", "4")
    (tmp_path / "4/EXPORT.json").unlink()
    assert speaks("qlora", "4"), "who names it knows"
    assert not speaks("lora", "4")
    (run / "recipe.yaml").write_text(
        json.dumps({**told, "tuning": {"type": "qlora"}, "model": {"path": str(tmp_path / "4")}})
    )
    with pytest.raises(UserError, match="was trained on other weights"):
        speakers_of(read([str(run)]))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "no such folder; name a finished run, or the folder of its weights"),
        (["begun"], "this run is not finished; the command that began it goes on with it"),
        (["alice", "--against", "nowhere"], "--against: nowhere: no such folder"),
        (["alice", "--model", "nowhere"], "nowhere: no model is there"),
        (["alice", "--temp", "-1"], "--temp: -1.0: expected a number from 0 to 100"),
        (["."], "no model is there (config.json is missing)"),
    ],
)
def test_what_cannot_answer_is_one_line(
    words: list[str],
    told: str,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(runs)
    with pytest.raises(SystemExit) as ended:
        cli(["chat", *words])
    assert ended.value.code == 64
    printed = capsys.readouterr().err
    assert told in printed
    assert printed.count("\n") == 1


def learnt(folder: Path, positions: int) -> Path:
    """A GPT-2 with a table of so many positions, and the tiny llama's tokenizer."""
    save_model(folder, tiny_model("gpt2", n_positions=positions, n_ctx=positions, vocab_size=512)[0]())
    config = tiny_config("gpt2", n_positions=positions, n_ctx=positions, vocab_size=512)
    (folder / "config.json").write_text(json.dumps(config))
    for file in MODEL.glob("token*"):
        shutil.copy(file, folder)
    return folder


def test_an_answer_ends_where_a_table_of_positions_does(tmp_path: Path) -> None:
    """MLX reads beyond the end of the table, and then the process is aborted."""
    resident = load_model(learnt(tmp_path / "gpt", 40))
    assert (resident.positions, load_model(MODEL).positions) == (40, None)
    question = talk.prompt_of(resident.tokenizer, [{"role": "user", "content": "Tom said"}])
    length = len(question)
    assert resident.tokens_behind(question, 100) == 40 - length
    assert resident.tokens_behind("Tom said", 3) == 3
    pieces = list(Speaker("it", resident).answers("Tom said", read([str(tmp_path), "--max-tokens", "100"])))
    assert len(pieces) <= 40 - length + 1  # the last one is what the tokenizer held back
    with pytest.raises(UserError, match="has 40 tokens, and the model's table of positions 40 rows"):
        resident.tokens_behind([1] * 40, 1)


@pytest.mark.parametrize("name", ["olmo stretched", "falcon-rw"])
def test_a_family_of_our_own_answers_as_its_configuration_says(name: str, tmp_path: Path) -> None:
    """In the spelling of transformers 5, and with a head of which the configuration does not speak: mlx-lm's loader
    alone would take other positions and drop the head."""
    config = {**config_of(name), "vocab_size": 512, "architectures": ["ForCausalLM"]}
    model = build_model(complete({**config, "tie_word_embeddings": False}, name), name)
    tensors = {k: mx.array(weight(k, v.shape)) for k, v in tree_flatten(model.parameters())}
    model.load_weights(list(tensors.items()))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file in MODEL.glob("token*"):
        shutil.copy(file, tmp_path)
    resident = load_model(tmp_path)
    tokens = mx.array([resident.tokenizer.encode("Tom said that it was not so")])
    assert mx.array_equal(resident.model(tokens), model.eval()(tokens))
    assert list(Speaker("it", resident).answers("Tom said", read([str(tmp_path), "--max-tokens", "4"])))
