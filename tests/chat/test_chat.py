"""A finished result answers as mlx-lm alone lets it answer, alone or beside its base, and never with a traceback."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from rich.console import Console
from support.speaking import MODEL, answers, finish, write_adapter

from mlx_empire.chat.command import read
from mlx_empire.chat.talk import side_by_side, speakers_of
from mlx_empire.cli import main as cli
from mlx_empire.run.resident import load_model, speaking_with

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
