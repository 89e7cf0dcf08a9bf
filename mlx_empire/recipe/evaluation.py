"""Decides what a recipe may ask of a model on held-out questions, and when that is enough: the `evaluation` section.

Scores are named `set.metric`, such as `facts.exact_match`; `eval_loss` is the loss on the validation split.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from mlx_empire.recipe.fields import Count, RecipePath, Section, as_tuple

# By one streamed forward pass, exact also for a model that no machine holds whole ...
TEACHER_FORCED = ("loss", "perplexity", "token_accuracy", "exact_match", "multiple_choice")
# ... and by greedy generation, where each machine can hold the model; the second line's are of answers from sources
# (`evaluation.grounding`).
CITATIONS = ("citation_coverage", "citation_accuracy", "retrieval_use")
REFUSALS = ("refusal_precision", "refusal_recall", "false_confidence")
GROUNDED = (*CITATIONS, *REFUSALS)
GENERATED = ("regular_expression", "valid_json", "json_schema", "scorer", *GROUNDED)
CONSTRAINED = "constrained"  # set.constrained.metric: the same metric where a grammar held the answers
# Tasks of EleutherAI's lm-eval that ask for log-likelihoods alone: `evaluation.tasks` turns their rows into choices.
Task = Literal[
    "arc_challenge",
    "arc_easy",
    "boolq",
    "copa",
    "hellaswag",
    "mmlu",
    "openbookqa",
    "piqa",
    "sciq",
    "winogrande",
]
TASKS = get_args(Task)
LOWER_IS_BETTER = ("loss", "perplexity", "false_confidence")
HELD_OUT_LOSS = "eval_loss"
LONGEST_NAME = 60


def worse_by(name: str, before: float, after: float) -> float:
    """By how much a score got worse, as a part of what it was; below 0 where it got better."""
    down = name == HELD_OUT_LOSS or name.rpartition(".")[2] in LOWER_IS_BETTER
    change = after - before if down else before - after
    return change / abs(before) if before else change


Metric = Literal[
    "loss",
    "perplexity",
    "token_accuracy",
    "exact_match",
    "multiple_choice",
    "regular_expression",
    "valid_json",
    "json_schema",
    "scorer",
    "citation_coverage",
    "citation_accuracy",
    "retrieval_use",
    "refusal_precision",
    "refusal_recall",
    "false_confidence",
]
SET = (
    "a list of sets such as [{path: data/facts.jsonl, metrics: [exact_match]}], with name, format, max_tokens, "
    "pattern, schema, refusal (a regular expression) and scorer (file.py:function) where a set needs them, with "
    "constrained: true for a second column that a grammar keeps within the schema, or with task where its rows are a "
    "benchmark's ({person} in a path stands for a daughter's name, in mlx_empire.daughters); metrics: "
    + ", ".join((*TEACHER_FORCED, *GENERATED))
    + "; tasks: "
    + ", ".join(TASKS)
)
GATE = (
    "a gate such as {metric: facts.exact_match, at_least: 0.95, for: 2} (at_least or at_most; and: a list of further "
    "ones that must hold too), or null (none)"
)


class EvaluationSet(Section):
    """One file of questions, what is measured on it, and what that needs."""

    path: RecipePath
    metrics: Annotated[tuple[Metric, ...], BeforeValidator(as_tuple), Field(min_length=1, max_length=16)]
    name: Annotated[str, Field(pattern=rf"^[A-Za-z0-9_-]{{1,{LONGEST_NAME}}}$")] | None = None
    format: Literal["auto", "chat", "completions", "text", "tokens"] = "auto"
    task: Task | None = None
    max_tokens: Annotated[int, Field(ge=1, le=65536)] = 128
    pattern: Annotated[str, Field(min_length=1, max_length=2000)] | None = None
    json_schema: RecipePath | None = Field(default=None, alias="schema")
    scorer: Annotated[str, Field(pattern=r"^.{1,1000}\.py:[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    refusal: Annotated[str, Field(min_length=1, max_length=2000)] | None = None
    constrained: bool = False

    @model_validator(mode="after")
    def _has_a_scorer_where_it_is_measured(self) -> Self:
        if (self.scorer is not None) != ("scorer" in self.metrics):
            raise ValueError("the metric scorer and the key scorer go together")
        return self

    @model_validator(mode="after")
    def _asks_a_task_for_choices(self) -> Self:
        if self.task is not None and self.metrics != ("multiple_choice",):
            raise ValueError("a task has multiple_choice alone")
        return self

    @model_validator(mode="after")
    def _has_a_use_for_what_it_says(self) -> Self:
        if self.refusal is not None and not self.grounded:
            raise ValueError(f"the key refusal is for {', '.join(GROUNDED)}")
        if self.constrained and "json_schema" not in self.metrics:
            raise ValueError("constrained goes with the metric json_schema")
        return self

    @property
    def grounded(self) -> bool:
        """Whether answers from sources are graded."""
        return any(metric in GROUNDED for metric in self.metrics)

    @property
    def title(self) -> str:
        """The set's name in scores: as given, else its file's, as long as a given one may be."""
        return self.name or re.sub(r"[^A-Za-z0-9_-]", "_", self.path.stem)[:LONGEST_NAME]

    @property
    def generates(self) -> bool:
        """Whether answers must be generated."""
        return bool(self.generated)

    @property
    def generated(self) -> tuple[str, ...]:
        """The metrics of generated answers."""
        return tuple(metric for metric in self.metrics if metric in GENERATED)

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """By title the metrics of each column: the free one, and the constrained one where there is one."""
        found = {self.title: tuple(self.metrics)}
        return found | ({f"{self.title}.{CONSTRAINED}": self.generated} if self.constrained else {})


class Gate(Section):
    """When a run has learnt enough: a score beyond a bound at so many evaluations in a row, and those of `also`."""

    model_config = ConfigDict(**Section.model_config, populate_by_name=False)

    metric: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,100}$")]
    at_least: float | None = None
    at_most: float | None = None
    times: Count = Field(default=1, alias="for")
    also: Annotated[tuple["Gate", ...], BeforeValidator(as_tuple), Field(max_length=16)] = Field(
        default=(), alias="and"
    )

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("one of at_least and at_most")
        if any(one.also for one in self.also):
            raise ValueError("gates of one list stand side by side")
        return self

    @property
    def parts(self) -> tuple["Gate", ...]:
        """The gate itself and all that must hold with it."""
        return (self, *self.also)

    def passes(self, value: float) -> bool:
        """Whether the score of `metric` is beyond the bound."""
        if self.at_least is not None:
            return value >= self.at_least
        return self.at_most is not None and value <= self.at_most


class EvaluationSection(Section):
    sets: Annotated[tuple[EvaluationSet, ...], BeforeValidator(as_tuple), Field(max_length=64)] = Field(
        title="What the model is asked at each evaluation, and how answers are judged.",
        default=(),
        description=SET,
    )
    stop_when: Gate | None = Field(
        title="Which score ends the run early, and freezes its result.", default=None, description=GATE
    )
    fallback: RecipePath | None = Field(
        title="Which recipe is trained next where a run ends without its gate.",
        default=None,
        description="the path of a recipe with another run.dir, or null (none)",
    )

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of all scores that the sets give."""
        columns = [column for one in self.sets for column in one.columns.items()]
        return tuple(f"{title}.{metric}" for title, metrics in columns for metric in metrics)

    @property
    def generates(self) -> bool:
        """Whether any set's answers must be generated."""
        return any(one.generates for one in self.sets)

    def of_person(self, name: str) -> Self:
        """The section of one daughter among many: in the sets' paths `{person}` is its name."""

        def own(path: Path) -> Path:
            return Path(str(path).replace("{person}", name))

        sets = tuple(
            one.model_copy(
                update={
                    "name": one.title,
                    "path": own(one.path),
                    "json_schema": one.json_schema and own(one.json_schema),
                }
            )
            for one in self.sets
        )
        return self.model_copy(update={"sets": sets})

    def contradiction(self, *, evaluates: bool) -> tuple[str, str] | None:
        """(key, sentence) of what cannot be; `evaluates`: the run stops to evaluate now and then."""
        idle = "stop_when" if self.stop_when else "sets" if self.sets else None
        if idle and not evaluates:
            return idle, f"{idle} has no meaning where nothing is evaluated; set run.eval_every, such as 10%"
        if self.fallback is not None and self.stop_when is None:
            return "fallback", "fallback has no meaning without a gate to miss; set evaluation.stop_when"
        titles = [one.title for one in self.sets]
        twice = next((title for title in titles if titles.count(title) > 1), None)
        if twice:
            return "sets", f"two sets are called {twice}; give one another name"
        known = (*self.scores, HELD_OUT_LOSS)
        for gate in self.stop_when.parts if self.stop_when else ():
            if gate.metric not in known:
                return "stop_when", f"{gate.metric} is not measured; there are {', '.join(known)}"
        return None
