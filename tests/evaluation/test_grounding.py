"""Grades of answers from sources: by hand, for each way in which an answer cites or refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.rows import MODEL

from mlx_empire.cli import main as cli
from mlx_empire.data.files import RawRow
from mlx_empire.errors import UserError
from mlx_empire.evaluate.command import read
from mlx_empire.evaluate.named import recipes_of
from mlx_empire.evaluation.grounding import Grounds, graded, grounds_of
from mlx_empire.recipe.load import parse_recipe

KNOWN, UNKNOWN = Grounds(("1", "2", "3"), ("2", "3")), Grounds(("1", "2", "3"), ())
REFUSAL = "not know"
NAMES = ["citation_coverage", "citation_accuracy", "retrieval_use"]


@pytest.mark.parametrize(
    ("text", "coverage", "accuracy", "use"),
    [
        ("The moon is far [2].", 1, 1, 1),
        ("The moon is far. [2]", 1, 1, 1),  # a mark after the full stop is the sentence's before it
        ("The moon is far [2]. It is cold.", 1 / 2, 1, 1),
        ("Far [1, 2]. Cold [3][1]; and old.\nAnd round", 2 / 3, 2 / 4, 1),
        ("It is far [9].", 0, 0, 0),  # no source of the row
        ("It is far [1].", 1, 0, 0),  # a source, and not one that holds the answer
        ("It is far.", 0, 0, 0),
        ("", 0, 0, 0),
        ("[2] [3].", 0, 0, 0),  # marks alone say nothing
        ("It is far.\n[2] It is cold.", 1 / 2, 1, 1),  # a mark that begins a line is that line's
        (
            "It is far.\n[2]\nIt is cold. [1]\n[3]",
            1,
            2 / 3,
            1,
        ),  # and one alone there is the statement's above
        ("1. The moon is far [2].\n2. Cold [3].", 1, 1, 1),  # numbers of a list are no statements
        ("1) [2] The moon is far.\n 2)  Cold.", 1 / 2, 1, 1),
        ("42. [2]", 1, 1, 1),  # and this is none
        ('{"answer": "Far [2]. Cold."}', 1 / 2, 1, 1),
        ('{"answer": "Far. Cold.", "citations": [2, "1", "1"]}', 1, 1 / 2, 1),
        ('{"answer": "Far [3]. Cold.", "citations": [1]}', 1 / 2, 1, 1),  # its own marks go before the list
        ('{"answer": "Far [2]."', 1, 1, 1),  # broken JSON is read as a text
    ],
)
def test_citations_are_counted_by_statement_and_by_source(
    text: str, coverage: float, accuracy: float, use: float
) -> None:
    found = graded(KNOWN, text, REFUSAL)
    assert [found[name] for name in NAMES] == pytest.approx([coverage, accuracy, use])
    assert "refusal_recall" not in found
    assert found["false_confidence"] == 0


@pytest.mark.parametrize(
    "text",
    ["I do not know.", '{"answer": "", "refused": true}', '{"answer": "I do not know", "refused": false}'],
)
def test_a_refusal_is_right_where_no_source_holds_the_answer(text: str) -> None:
    right = graded(UNKNOWN, text, REFUSAL)
    assert right == {"refused": 1, "unanswerable": 1, "refusal_precision": 1, "refusal_recall": 1}
    wrong = graded(KNOWN, text, REFUSAL)
    assert wrong == {"refused": 1, "unanswerable": 0, "refusal_precision": 0, "retrieval_use": 0}


def test_who_answers_what_no_source_holds_is_falsely_confident() -> None:
    found = graded(UNKNOWN, "It is far [2].", None)
    assert found == {"refused": 0, "unanswerable": 1, "false_confidence": 1, "refusal_recall": 0}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"sources": ["1"]}, "needs sources, and supports"),
        ({"sources": "1", "supports": []}, "needs sources, and supports"),
        ({"sources": ["1", True], "supports": []}, "needs sources, and supports"),
        ({"sources": [1, 2], "supports": [3]}, "supports: '3' is not among its sources"),
        *(
            ({"sources": ["1", name], "supports": []}, rf"sources: {re.escape(repr(name))} cannot be cited")
            for name in ("", "a,b", "a; b", "[a", "a]", "a\nb")
        ),
    ],
)
def test_a_row_that_does_not_say_its_sources_is_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=rf"^q\.jsonl:4: {said}"):
        grounds_of(RawRow("q.jsonl:4", row))


@pytest.mark.parametrize("name", ["Lee et al. 2020", "docs/a (1).md", "Who? Why!", "Über-1"])
def test_a_source_whose_name_has_full_stops_and_blanks_can_be_cited(name: str) -> None:
    grounds = grounds_of(RawRow("q.jsonl:4", {"sources": [name, "b"], "supports": [name]}))
    found = graded(grounds, f"It is far [{name}]. It is cold. [b, {name}]", None)
    assert [found[metric] for metric in NAMES] == pytest.approx([1, 2 / 3, 1])


def rows(path: Path, *several: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps({"prompt": "Tom said", **one}) + "\n" for one in several))


def evaluated(tmp_path: Path, more: str) -> dict[str, Any]:
    asked = f"evaluation.sets=[{{path: {tmp_path}/q.jsonl, max_tokens: 4, {more}}}]"
    words = [str(MODEL), asked, "--json", str(tmp_path / "found.json"), "data.sequence_length=64"]
    assert cli(["evaluate", *words, "model.dtype=float32"]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    return found


def test_a_score_is_the_mean_over_the_answers_that_its_metric_looks_at(tmp_path: Path) -> None:
    """By a refusal that every answer is, and by one that none is."""
    known, unknown = {"sources": ["1", "2"], "supports": ["2"]}, {"sources": ["1"], "supports": []}
    rows(tmp_path / "q.jsonl", known, known, unknown)
    metrics = "citation_coverage, retrieval_use, refusal_precision, refusal_recall, false_confidence"
    found = {}
    for refusal in ("^", "never this"):
        told = evaluated(tmp_path, f"metrics: [{metrics}], refusal: '{refusal}'")
        found[refusal] = [one["after"] for one in told["scores"]]
        (graded_set,) = told["graded"]
        counts = {(cell["case"], cell["did"]): cell["rows"] for cell in graded_set["confusion"]}
        cases = {"has an answer in its sources": 2, "has none": 1}
        did = "refused" if refusal == "^" else "answered"
        assert {key: n for key, n in counts.items() if n} == {(case, did): n for case, n in cases.items()}
        assert graded_set["failed"] == (2 if refusal == "^" else 3)
    assert found["^"] == pytest.approx([0, 0, 1 / 3, 1, 0])
    assert found["never this"] == pytest.approx([0, 0, 0, 0, 1 / 3])


@pytest.mark.parametrize(
    ("metrics", "supports", "said"),
    [
        ("refusal_recall", ["1"], "no row whose supports are []; refusal_recall need some"),
        ("retrieval_use", [], "no row whose supports name a source; retrieval_use need some"),
    ],
)
def test_a_set_in_which_a_metric_has_nothing_to_look_at_is_refused(
    metrics: str, supports: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows(tmp_path / "q.jsonl", {"sources": ["1"], "supports": supports})
    with pytest.raises(SystemExit) as ended:
        evaluated(tmp_path, f"metrics: [{metrics}]")
    assert ended.value.code == 64
    assert capsys.readouterr().err.endswith(f"{tmp_path}/q.jsonl: {said}\n")


@pytest.mark.parametrize(
    "wrong",
    [
        "{path: q, metrics: [valid_json], refusal: x}",
        "{path: q, metrics: [valid_json], constrained: true}",
    ],
)
def test_a_key_goes_with_its_metric(wrong: str) -> None:
    recipe = "model: {path: m}\ndata: {path: d, sequence_length: 8}\nbatch: {global_size: 1}\n"
    recipe += "optimizer: {learning_rate: 1}\nrun: {dir: r, steps: 1, eval_every: 1}\n"
    with pytest.raises(UserError, match=r"evaluation\.sets: .*refusal \(a regular expression\)"):
        parse_recipe(recipe + f"evaluation: {{sets: [{wrong}]}}", "r")


@pytest.mark.parametrize("unanswerable", [True, False])
def test_a_file_of_questions_from_sources_is_graded_without_a_recipe(
    unanswerable: bool, tmp_path: Path
) -> None:
    known = {"sources": ["1"], "supports": ["1"]}
    rows(tmp_path / "q.jsonl", known, {**known, "supports": []} if unanswerable else known)
    (recipe,) = recipes_of(read([str(MODEL), "--sets", f"{tmp_path}/q.jsonl"]), 1)
    assert [name in recipe.evaluation.sets[0].metrics for name in ("retrieval_use", "refusal_recall")] == [
        True,
        unanswerable,
    ]
