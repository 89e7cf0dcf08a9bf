"""Rows of benchmarks as lm-eval words them, written out by hand from its definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.rows import MODEL

from mlx_empire.data.encode import load_tokenizer
from mlx_empire.data.files import RawRow
from mlx_empire.errors import UserError
from mlx_empire.evaluation.questions import load_questions
from mlx_empire.evaluation.tasks import choices_of
from mlx_empire.recipe.evaluation import TASKS, EvaluationSet

LETTERED = {"text": ["a cat", "a dog"], "label": ["A", "B"]}
MMLU = (
    "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    "What is 1 + 1?\nA. one\nB. two\nAnswer:"
)
ROWS: dict[str, tuple[dict[str, Any], list[tuple[str, str]], int]] = {
    "arc_easy": (
        {"question": "What barks?", "choices": LETTERED, "answerKey": "B"},
        [("Question: What barks?\nAnswer:", " a cat"), ("Question: What barks?\nAnswer:", " a dog")],
        1,
    ),
    "arc_challenge": (
        {"question": "What purrs?", "choices": LETTERED, "answerKey": "A"},
        [("Question: What purrs?\nAnswer:", " a cat"), ("Question: What purrs?\nAnswer:", " a dog")],
        0,
    ),
    "boolq": (
        {"passage": "Snow is white.", "question": "is snow white", "answer": True},
        [("Snow is white.\nQuestion: is snow white?\nAnswer:", c) for c in (" no", " yes")],
        1,
    ),
    "copa": (
        {
            "premise": "It rained.",
            "choice1": "I got wet.",
            "choice2": "The sun shone.",
            "question": "effect",
            "label": 0,
        },
        [("It rained therefore", "  i got wet."), ("It rained therefore", "  the sun shone.")],
        0,
    ),
    "hellaswag": (
        {
            "activity_label": "Cooking",
            "ctx_a": "A man cooks [step] rice.",
            "ctx_b": "he",
            "endings": ["eats it [title] Then sleeps", "flies"],
            "label": "0",
        },
        [("Cooking: A man cooks rice. He", c) for c in (" eats it. Then sleeps", " flies")],
        0,
    ),
    "mmlu": (
        {
            "question": " What is 1 + 1? ",
            "choices": ["one", "two"],
            "answer": 1,
            "subject": "abstract_algebra",
        },
        [(MMLU, " A"), (MMLU, " B")],
        1,
    ),
    "openbookqa": (
        {"question_stem": "A pet that barks is", "choices": LETTERED, "answerKey": "B"},
        [("A pet that barks is", " a cat"), ("A pet that barks is", " a dog")],
        1,
    ),
    "piqa": (
        {"goal": "Eat soup.", "sol1": "With a spoon.", "sol2": "With a fork.", "label": 0},
        [("Question: Eat soup.\nAnswer:", c) for c in (" With a spoon.", " With a fork.")],
        0,
    ),
    "sciq": (
        {
            "support": " Water boils.",
            "question": "At what?",
            "distractor1": "10 C",
            "distractor2": "20 C",
            "distractor3": "30 C",
            "correct_answer": "100 C",
        },
        [("Water boils.\nQuestion: At what?\nAnswer:", f" {n} C") for n in (10, 20, 30, 100)],
        3,
    ),
    "winogrande": (
        {
            "sentence": "The cup did not fit in the bag as _ was big.",
            "option1": "the cup",
            "option2": "the bag",
            "answer": "1",
        },
        [
            ("The cup did not fit in the bag as the cup", " was big."),
            ("The cup did not fit in the bag as the bag", " was big."),
        ],
        0,
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_row_is_worded_as_lm_eval_words_it(task: str) -> None:
    row, pairs, right = ROWS[task]
    found = choices_of(task, RawRow("here", row))
    assert (found.pairs, found.right) == (pairs, right)


@pytest.mark.parametrize("task", TASKS)
def test_another_row_is_refused_with_the_columns_that_it_must_have(task: str) -> None:
    whole = ROWS[task][0]
    for value in (
        {},
        *({k: v for k, v in whole.items() if k != name} for name in whole if name != "subject"),
    ):
        with pytest.raises(UserError, match=rf"^file:1: not a row of {task} \(no '.*'\); it has "):
            choices_of(task, RawRow("file:1", value))


@pytest.mark.parametrize("task", ["arc_easy", "copa", "hellaswag", "mmlu", "piqa", "winogrande"])
def test_an_answer_that_is_none_of_the_choices_is_refused(task: str) -> None:
    wrong = {**ROWS[task][0], "label": "9", "answer": "9", "answerKey": "Z"}
    with pytest.raises(UserError, match=f"^here: not a row of {task} "):
        choices_of(task, RawRow("here", wrong))


def test_the_tokens_of_a_choice_are_those_after_the_text_before_it(tmp_path: Path) -> None:
    """Without a chat template, after what the tokenizer puts before every text, and without an end."""
    file = tmp_path / "piqa.jsonl"
    file.write_text('{"goal": "Eat soup.", "sol1": "With a spoon.", "sol2": "With a fork.", "label": 0}\n')
    asked = EvaluationSet(path=file, task="piqa", metrics=["multiple_choice"])
    ((alternatives, right),) = load_questions(asked, MODEL, 64, 512).choices
    tokenizer = load_tokenizer(MODEL)
    assert right == 0
    for answer, text in zip(alternatives, (" With a spoon.", " With a fork."), strict=True):
        whole = tokenizer.encode(f"Question: Eat soup.\nAnswer:{text}")
        assert answer.tokens == whole
        before = len(tokenizer.encode("Question: Eat soup.\nAnswer:"))
        assert answer.counted == [0] * before + [1] * (len(whole) - before)
