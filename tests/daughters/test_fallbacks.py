"""The fallback of a recipe for daughters: refused before the first step, and no failure is forgotten on the way."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.rows import MODEL

from mlx_empire.daughters import work
from mlx_empire.daughters.command import read
from mlx_empire.errors import UserError
from mlx_empire.recipe.load import load_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.fallback import refuse_fallback

RECIPE = f"""\
model: {{path: {MODEL}}}
tuning: {{type: lora}}
data: {{path: people, sequence_length: 8}}
batch: {{global_size: 1}}
optimizer: {{learning_rate: 0.001}}
run: {{dir: first, steps: 3, eval_every: 1}}
evaluation: {{stop_when: {{metric: eval_loss, at_most: 1}}, fallback: second.yaml}}
"""
SECOND = RECIPE.replace("dir: first", "dir: second").replace(", fallback: second.yaml", "")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("alice", "bob"):
        Path(f"people/{name}").mkdir(parents=True)
        Path(f"people/{name}/train.jsonl").write_text('{"text": "a"}\n')
    Path("first.yaml").write_text(RECIPE)
    Path("second.yaml").write_text(SECOND)
    return tmp_path


@pytest.fixture
def rounds(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """What each round was asked for; nothing is trained. Alice fails, Bob misses the first gate."""
    asked: list[tuple[str, list[str]]] = []

    def once(words: object, recipe: Recipe, people: Path, hosts: object, only: Sequence[str]) -> int:
        asked.append((recipe.run.dir.name, list(only)))
        if recipe.run.dir.name == "second":
            return 0
        (recipe.run.dir / "bob").mkdir(parents=True)
        (recipe.run.dir / "bob/COMPLETE").write_text("\n")
        return work.SOME_FAILED

    monkeypatch.setattr(work, "oversee_once", once)
    return asked


def oversee() -> int:
    words = ["first.yaml", "--people", "people"]
    return work.oversee(words, read(words))


def test_who_failed_is_told_by_the_exit_code_where_the_fallback_of_another_succeeds(
    rounds: list[tuple[str, list[str]]],
) -> None:
    assert oversee() == work.SOME_FAILED
    assert rounds == [("first", []), ("second", ["bob"])]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("type: lora", "type: full", "evaluation.fallback: second.yaml: tuning.type: full: daughters are"),
        (
            "path: people",
            "sources: [{path: a, weight: 1}, {path: b, weight: 1}]",
            "evaluation.fallback: second.yaml: data.sources: a, b: each person's rows are in --people",
        ),
        ("dir: second", "dir: ./x/../first", "its run.dir x/../first is that of the run"),
    ],
)
def test_a_fallback_for_which_daughters_cannot_be_trained_is_refused_before_the_first_step(
    before: str, after: str, said: str, rounds: list[tuple[str, list[str]]]
) -> None:
    Path("second.yaml").write_text(SECOND.replace(before, after))
    with pytest.raises(UserError) as caught:
        oversee()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not rounds


def test_the_fallback_of_a_fallback_is_asked_too(rounds: list[tuple[str, list[str]]]) -> None:
    Path("second.yaml").write_text(RECIPE.replace("dir: first", "dir: second").replace("second.y", "third.y"))
    Path("third.yaml").write_text(SECOND.replace("dir: second", "dir: third, resume: '3'"))
    with pytest.raises(UserError, match=r"^evaluation\.fallback: third\.yaml: run\.resume: 3: each daughter"):
        oversee()
    assert not rounds


@pytest.mark.parametrize(
    ("spelling", "platform"), [("x/../first", "linux"), ("linked/first", "linux"), ("First", "darwin")]
)
def test_one_folder_by_two_spellings_is_one_folder(
    spelling: str, platform: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("linked").symlink_to(place)
    Path("second.yaml").write_text(
        RECIPE.replace("dir: first", f"dir: {spelling}").replace("second.yaml", "first.yaml")
    )
    recipe = load_recipe(Path("first.yaml"))
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(
        UserError, match=r"second\.yaml: its run\.dir .* is that of the run that it would follow"
    ):
        refuse_fallback(recipe)
