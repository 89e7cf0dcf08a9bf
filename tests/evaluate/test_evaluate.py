"""`mlx-empire evaluate`: scores and rows are those of the whole model by mlx-lm, wherever the weights come from."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from rich.console import Console
from support.mpi import mpirun, rank_environment
from support.speaking import MODEL, answers, finish, write_adapter

from mlx_empire.checkpoint.manifest import sampled_digest
from mlx_empire.cli import main as cli
from mlx_empire.evaluate.document import Scored, changed_document, score_table

FACTS = [("Tom has a", " red ball"), ("Lily likes", " the moon"), ("The dog ate", " a blue hat")]
PIQA = [
    {"goal": "She was happy.", "sol1": "She smiled.", "sol2": "Moon moon.", "label": 0},
    {"goal": "He went to", "sol1": "the park.", "sol2": "of of of.", "label": 1},
]
LENGTH = "data.sequence_length=64"
SAID = "evaluation.sets=[{{path: {}/said.jsonl, metrics: [regular_expression], max_tokens: 12}}]"
FACTS_TOO = ", {{path: {}/facts.jsonl, metrics: [loss, exact_match]}}]"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters' runs, and questions of which the first adapter says one word for word and the base none."""
    folder = tmp_path_factory.mktemp("evaluate")
    for seed, name in ((100, "alice"), (200, "bob")):
        write_adapter(folder / name / "final", seed=seed)
        finish(folder / name)
    said = answers(["Tom said"], folder / "alice/final", 6, chat=True)[0]
    rows = [{"prompt": a, "completion": b} for a, b in FACTS]
    (folder / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "said.jsonl").write_text(json.dumps({"prompt": "Tom said", "pattern": f"^{said[:8]}"}) + "\n")
    (folder / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PIQA))
    return folder


def logs(model: Any, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each token after those before it, and whether it is the likeliest."""
    logits = np.array(model(mx.array([ids[:-1]]))[0].astype(mx.float32)).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    found = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return found[np.arange(len(ids) - 1), ids[1:]], logits.argmax(-1) == np.array(ids[1:])


def expected(adapter: Path | None) -> dict[str, Any]:
    """By the whole model: loss, exact answers, and the likelier solution, a row each."""
    model, tokenizer = mlx_lm.load(str(MODEL), adapter_path=None if adapter is None else str(adapter))[:2]
    model.set_dtype(mx.float32)
    sums, count, exact, losses = 0.0, 0, [], []
    for prompt, completion in FACTS:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        start = len(list(tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)))
        ids = list(tokenizer.apply_chat_template(turns))
        values, hits = (found[start - 1 :] for found in logs(model, ids))
        sums, count = sums - values.sum(), count + len(values)
        exact.append(bool(hits.all()))
        losses.append(-values.mean())
    right = []
    for row in PIQA:
        likely = []
        for choice in (row["sol1"], row["sol2"]):
            context = f"Question: {row['goal']}\nAnswer:"
            ids = tokenizer.encode(f"{context} {choice}")
            likely.append(logs(model, ids)[0][len(tokenizer.encode(context)) - 1 :].sum())
        right.append(int(np.argmax(likely)) == row["label"])
    return {"loss": sums / count, "exact": exact, "losses": losses, "right": right}


def evaluated(place: Path, *words: object) -> dict[str, Any]:
    assert (
        cli(
            ["evaluate", *map(str, words), "--json", str(place / "found.json"), LENGTH, "model.dtype=float32"]
        )
        == 0
    )
    found: dict[str, Any] = json.loads((place / "found.json").read_text())
    return found


def test_two_results_beside_one_another_score_as_mlx_lm_has_them(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--sets",
        place / "facts.jsonl",
        "--tasks",
        "piqa",
        "--tasks-from",
        place,
        "--against",
        place / "alice",
    ]
    found = evaluated(place, MODEL, *words, "--html", place / "page.html")
    before, after = expected(place / "alice/final"), expected(None)
    scores = {one["name"]: one for one in found["scores"]}
    for side, whole in (("before", before), ("after", after)):
        assert math.isclose(scores["facts.loss"][side], whole["loss"], rel_tol=1e-5)
        assert scores["facts.exact_match"][side] == np.mean(whole["exact"])
        assert scores["piqa.multiple_choice"][side] == np.mean(whole["right"])
    rows = [row["values"] for row in found["rows"]["facts"]]
    assert np.allclose([row["loss"] for row in rows], after["losses"], rtol=1e-5)
    rose = [r for r in found["sets"][0]["changed"] if r["kind"] == "loss rose most"]
    by = {i + 1: b - a for i, (a, b) in enumerate(zip(before["losses"], after["losses"], strict=True))}
    assert [row["row"] for row in rose] == sorted((i for i in by if by[i] > 0), key=lambda i: -by[i])
    assert rose
    printed = capsys.readouterr().out
    assert f"worse than {place}/alice: facts.loss {before['loss']:.4f} to {after['loss']:.4f}" in printed
    page = (place / "page.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert FACTS[rose[0]["row"] - 1][0] in page
    assert "<script" not in page


def test_an_answer_that_only_one_says_is_a_row_that_changed(place: Path) -> None:
    found = evaluated(place, place / "alice", "--against", "base", SAID.format(place))
    assert [(one["before"], one["after"]) for one in found["scores"]] == [(0.0, 1.0)]
    (only,) = found["sets"][0]["changed"]
    assert (only["kind"], only["what"]) == ("right now", "regular_expression")
    asked = answers(["Tom said"], place / "alice/final", 12, chat=True)[0]
    assert only["after"] == asked
    assert not only["before"].startswith(asked[:8])


def test_a_mark_that_sank_a_little_is_no_longer_right_nowhere_and_names_are_no_markup() -> None:
    def of(name: str, mark: float, right: float) -> Scored:
        row = {
            "question": "q",
            "expected": None,
            "said": "s",
            "values": {"scorer": mark, "valid_json": right},
        }
        return Scored(name, {"[red]mine.scorer": mark}, {"mine": [row]})

    for right, lost in ((1.0, 0), (0.0, 1)):
        found = changed_document([of("[bold]a", 0.81, 1.0), of("[/x] b", 0.80, right)])
        assert found["sets"][0]["lost"] == lost
        assert [row["what"] for row in found["sets"][0]["changed"]] == ["valid_json"] * lost
    console = Console(file=io.StringIO(), width=80)
    console.print(score_table(found))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(name in shown for name in ("[bold]a", "[/x] b", "[red]mine.scorer"))


@pytest.mark.parametrize("kind", ["a model's folder", "an adapter of another tool"])
def test_foreign_weights_need_no_recipe(kind: str, place: Path, tmp_path: Path) -> None:
    adapter: Path | None = place / "bob/final"
    if kind == "a model's folder":
        words, adapter = [MODEL], None
    else:
        shutil.copytree(place / "bob/final", tmp_path / "bare")
        words = [tmp_path / "bare", "--model", MODEL]
    found = evaluated(place, *words, "--sets", f"{place}/facts.jsonl=loss")
    assert math.isclose(found["scores"][0]["after"], expected(adapter)["loss"], rel_tol=1e-5)


@pytest.mark.slow
def test_two_ranks_give_the_bits_of_one_and_of_an_adapter_in_peft_s_form(place: Path, tmp_path: Path) -> None:
    assert (
        cli(["export", "peft", str(place / "alice/final"), str(tmp_path / "peft"), "--model", str(MODEL)])
        == 0
    )
    words = ["--against", "base", SAID.format(place)[:-1] + FACTS_TOO.format(place)]
    alone = evaluated(place, place / "alice", *words)
    command = [mpirun(), "--oversubscribe", "-n", "2", sys.executable, "-m", "mlx_empire.evaluate"]
    command += [str(tmp_path / "peft"), "--model", str(MODEL), *map(str, words), "--json", "two.json", LENGTH]
    subprocess.run(
        [*command, "model.dtype=float32"], cwd=tmp_path, env=rank_environment(str(tmp_path)), check=True
    )
    both = json.loads((tmp_path / "two.json").read_text())
    assert both["scores"] == alone["scores"]
    assert both["rows"] == alone["rows"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{place}/alice"], "RUN: {place}/alice: its recipe asks no questions; name some by --sets FILE or"),
        (["{place}/nobody"], "RUN: {place}/nobody: no such folder"),
        (["{place}/alice/final", "--sets", "nofile"], "data.path nofile: no such file or folder"),
        (
            ["{place}/alice", "--tasks", "x", "--tasks-from", "."],
            "--tasks: x: not known; there are arc_challenge, ",
        ),
        (["{place}/alice", "--tasks", "piqa"], "--tasks and --tasks-from go together"),
        (
            ["{model}", "--against", "base", "--sets", "{place}/facts.jsonl"],
            "--against: base: {model}: nothing says",
        ),
        *(
            (
                ["{model}", "--sets", "{place}/facts.jsonl", option, "{place}/facts.jsonl"],
                option + ": {place}/facts.jsonl: is read here, and is left as it is",
            )
            for option in ("--json", "--html")
        ),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    words: list[str], told: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"place": str(place), "model": str(MODEL)}
    with pytest.raises(SystemExit) as ended:
        cli(["evaluate", *(word.format(**names) for word in words)])
    assert ended.value.code == 64
    said = capsys.readouterr().err
    assert told.format(**names) in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("file", ["answer.json", "judge.py", "asked/train.jsonl", "hosts.txt"])
def test_no_file_that_decides_scores_is_written_over(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("asked").mkdir()
    for name in ("answer.json", "judge.py", "asked/train.jsonl", "hosts.txt"):
        Path(name).write_text("{}\n")
    one = "{path: asked, metrics: [json_schema, scorer], schema: answer.json, scorer: judge.py:judge}"
    words = [f"evaluation.sets=[{one}]", "run.hosts=hosts.txt"]
    with pytest.raises(SystemExit) as ended:
        cli(["evaluate", str(MODEL), *words, "--json", file])
    assert ended.value.code == 64
    assert f"--json: {file}: is read here, and is left as it is" in capsys.readouterr().err
    assert Path(file).read_text() == "{}\n"


def test_two_options_that_name_one_file_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    json_file, html = tmp_path / "found", tmp_path / "x/../found"
    with pytest.raises(SystemExit) as ended:
        cli(
            [
                "evaluate",
                str(MODEL),
                "--sets",
                f"{place}/facts.jsonl",
                "--json",
                str(json_file),
                "--html",
                str(html),
            ]
        )
    assert ended.value.code == 64
    assert f"--html: {html}: is what --json writes; choose another name" in capsys.readouterr().err
    assert not json_file.exists()


def test_an_adapter_of_a_packed_base_scores_alike_on_that_base_packed_beforehand_and_on_no_other(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And may go on there: `tuning.start` is how it is put on its base here."""
    run = tmp_path / "alice"
    shutil.copytree(place / "alice", run)
    told = json.loads((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(json.dumps({**told, "tuning": {"type": "qlora"}}))
    (run / "plan.json").write_text(json.dumps({"base_digest": sampled_digest(MODEL)}))
    for bits in ("4", "8"):
        assert cli(["export", "base", str(MODEL), str(tmp_path / bits), "--bits", bits]) == 0
    sets = ["--sets", f"{place}/facts.jsonl=loss"]
    scores = [
        evaluated(place, run, *words, *sets)["scores"] for words in ([], ["--model", str(tmp_path / "4")])
    ]
    assert scores[0] == scores[1]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        evaluated(place, run, "--model", str(tmp_path / "8"), *sets)
    assert ended.value.code == 64
    assert capsys.readouterr().err.count("\n") == 1
