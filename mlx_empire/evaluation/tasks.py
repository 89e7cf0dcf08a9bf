"""Rows of known benchmarks as questions with choices, worded as EleutherAI's lm-eval words them without examples.

Decides, for each task of a named list (`recipe.evaluation.TASKS`), which columns its rows have and what text comes
before each choice. A choice is as likely as its tokens together after that text, as lm-eval's `acc` counts; no chat
template is used. Rows come from the user's own folder as JSON lines, in the columns in which they are published.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_empire.data.files import RawRow
from mlx_empire.errors import UserError

LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Choices:
    """(text before, text of the choice) for every choice, and which is right."""

    pairs: list[tuple[str, str]]
    right: int


def choices_of(task: str, row: RawRow) -> Choices:
    """A row of a task as choices. UserError where it has not that task's columns."""
    try:
        found = _TASKS[task](row.value)
        if not 0 <= found.right < len(found.pairs):
            raise ValueError(f"the right one of {len(found.pairs)} choices is {found.right}")
        if not all(context.strip() and choice.strip() for context, choice in found.pairs):
            raise ValueError("a text is empty")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else str(error)[:100]
        raise UserError(f"{row.where}: not a row of {task} ({why}); it has {COLUMNS[task]}") from None
    return found


def _after(context: str, choices: list[str], right: int) -> Choices:
    return Choices([(context, f" {choice}") for choice in choices], right)


def _arc(row: Mapping[str, Any]) -> Choices:
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    return _after(f"Question: {row['question']}\nAnswer:", list(texts), list(labels).index(row["answerKey"]))


def _boolq(row: Mapping[str, Any]) -> Choices:
    right = row["label"] if "label" in row else row["answer"]
    return _after(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], int(right))


def _copa(row: Mapping[str, Any]) -> Choices:
    joined = {"cause": "because", "effect": "therefore"}[row["question"]]
    # lm-eval's choices begin with a blank here, to which the one between text and choice is added.
    choices = [f" {text[0].lower()}{text[1:]}" for text in (row["choice1"], row["choice2"])]
    return _after(f"{row['premise'].strip()[:-1]} {joined}", choices, int(row["label"]))


def _hellaswag(row: Mapping[str, Any]) -> Choices:
    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return _after(context, [clean(one) for one in row["endings"]], int(row["label"]))


def _mmlu(row: Mapping[str, Any]) -> Choices:
    subject = f" about {row['subject'].replace('_', ' ')}" if row.get("subject") else ""
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=False))
    context = (
        f"The following are multiple choice questions (with answers){subject}.\n\n"
        f"{row['question'].strip()}\n{listed}\nAnswer:"
    )
    right = row["answer"]
    return _after(
        context,
        list(LETTERS[: len(row["choices"])]),
        LETTERS.index(right) if isinstance(right, str) else int(right),
    )


def _openbookqa(row: Mapping[str, Any]) -> Choices:
    choices = row["choices"]
    return _after(
        row["question_stem"], list(choices["text"]), list(choices["label"]).index(row["answerKey"].strip())
    )


def _piqa(row: Mapping[str, Any]) -> Choices:
    return _after(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def _sciq(row: Mapping[str, Any]) -> Choices:
    wrong = [row[f"distractor{number}"] for number in (1, 2, 3)]
    context = f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"
    return _after(context, [*wrong, row["correct_answer"]], 3)


def _winogrande(row: Mapping[str, Any]) -> Choices:
    before, _, after = row["sentence"].partition("_")
    pairs = [(before + row[f"option{number}"], f" {after.strip()}") for number in (1, 2)]
    return Choices(pairs, int(row["answer"]) - 1)


_TASKS: dict[str, Callable[[Mapping[str, Any]], Choices]] = {
    "arc_challenge": _arc,
    "arc_easy": _arc,
    "boolq": _boolq,
    "copa": _copa,
    "hellaswag": _hellaswag,
    "mmlu": _mmlu,
    "openbookqa": _openbookqa,
    "piqa": _piqa,
    "sciq": _sciq,
    "winogrande": _winogrande,
}
COLUMNS = {
    "arc_challenge": "question, choices: {text, label}, answerKey",
    "arc_easy": "question, choices: {text, label}, answerKey",
    "boolq": "passage, question, answer or label",
    "copa": "premise, choice1, choice2, question (cause or effect), label",
    "hellaswag": "activity_label, ctx_a, ctx_b, endings, label",
    "mmlu": "question, choices, answer, subject",
    "openbookqa": "question_stem, choices: {text, label}, answerKey",
    "piqa": "goal, sol1, sol2, label",
    "sciq": "support, question, distractor1 to 3, correct_answer",
    "winogrande": "sentence with _, option1, option2, answer (1 or 2)",
}
