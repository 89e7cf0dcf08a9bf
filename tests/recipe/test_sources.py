"""data.sources and data.order in a recipe: what is refused, what survives, and what a continued run may change."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_empire.errors import UserError
from mlx_empire.recipe.changes import require_acceptable
from mlx_empire.recipe.load import dump_recipe, parse_recipe
from mlx_empire.recipe.schema import Recipe

MIXED = "data.sources=[{path: a, weight: 3}, {path: 'b c', weight: 0.1, from: 0.25}, {path: a, to: 0.5}]"


def mixed(minimal: str, sources: str = MIXED, *overrides: str) -> Recipe:
    return parse_recipe(minimal.replace("  path: data/tiny\n", ""), "x.yaml", [sources, *overrides])


def test_sources_survive_the_dump_and_name_each_path_once(minimal: str) -> None:
    recipe = mixed(minimal)
    assert parse_recipe(dump_recipe(recipe), "y") == recipe
    assert recipe.data.paths == (Path("a"), Path("b c"))
    assert [(one.weight, one.start, one.end) for one in recipe.data.sources] == [
        (3, 0, 1),
        (0.1, 0.25, 1),
        (1, 0, 0.5),
    ]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([MIXED], ["data.sources: there is data.path as well", "data.path=null"]),
        (
            ["data.path=null"],
            ["data.path: missing; give the path of a folder with train.jsonl", "data.sources"],
        ),
        (
            ["data.path=null", "data.sources=[{path: a, to: 0.5}, {path: b, from: 0.75}]"],
            ["data.sources: no source is open from 0.5 to 0.75 of the run", "widen"],
        ),
        (["data.path=null", "data.sources=[{path: a, from: 0.1}]"], ["from 0 to 0.1 of the run"]),
        (
            ["data.path=null", "data.sources=[{path: a}, {path: b, weight: 0}]"],
            ["got 0 at position 2", "above 0"],
        ),
        (
            ["data.path=null", "data.sources=[{path: a}, {path: b, from: 0.5, to: 0.5}]"],
            ["at position 2", "from"],
        ),
        (["data.path=null", "data.sources=[{path: a, wieght: 2}]"], ["unknown key 'wieght' at position 1"]),
        (["data.path=null", "data.sources=[{weight: 2}]"], ['got {"weight": 2}; expected a list of sources']),
        (["data.order=file", "data.packing=true"], ["data.order: order file has no meaning with packing"]),
        (["data.order=sorted"], ["'sorted'", "shuffled", "file"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(minimal: str, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        parse_recipe(minimal, "x.yaml", overrides)
    assert "\n" not in str(refused.value)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_a_missing_section_is_asked_for_with_its_path(minimal: str) -> None:
    with pytest.raises(UserError, match="add 'data:' with path and sequence_length"):
        parse_recipe(minimal.replace("data:\n  path: data/tiny\n  sequence_length: 16\n", ""), "x.yaml")


def refused(before: Recipe, now: Recipe, *accepted: str) -> str:
    with pytest.raises(UserError) as told:
        require_acceptable(before, now, accepted, "checkpoint c")
    return str(told.value)


def test_a_continued_run_may_have_its_sources_elsewhere_but_not_mixed_otherwise(minimal: str) -> None:
    before = mixed(minimal)
    moved = mixed(minimal, MIXED.replace("path: a", "path: z"))
    assert [line.split(":")[0] for line in require_acceptable(before, moved, (), "c")] == ["data.sources"]
    for other in (
        MIXED.replace("weight: 3", "weight: 4"),
        MIXED.replace("0.25", "0.3"),
        MIXED.replace("{path: a, to", "{path: d, to"),
        "data.sources=[{path: a, weight: 3}]",
    ):
        assert "add run.accept_changes=[data.sources]" in refused(before, mixed(minimal, other))
        assert require_acceptable(before, mixed(minimal, other), ["data.sources"], "c")
    assert "data.order: shuffled -> file" in refused(before, mixed(minimal, MIXED, "data.order=file"))


def test_the_length_of_a_run_moves_a_curriculum_and_no_plain_mixture(minimal: str) -> None:
    whole = "data.sources=[{path: a, weight: 3}, {path: b}]"
    assert require_acceptable(mixed(minimal, whole), mixed(minimal, whole, "run.steps=20"), (), "c")
    assert "run.steps: 10 -> 20" in refused(mixed(minimal), mixed(minimal, MIXED, "run.steps=20"))
