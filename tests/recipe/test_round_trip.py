"""Any recipe that the schema can hold is written as YAML that loads as an equal recipe."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mlx_empire.errors import UserError
from mlx_empire.recipe.load import dump_recipe, load_recipe, parse_recipe
from mlx_empire.recipe.schema import Recipe

REPOSITORY = Path(__file__).parents[2]

letters = st.characters(exclude_categories=["Cc", "Cs", "Cn", "Zl", "Zp"])
names = st.text(letters, min_size=1, max_size=20).filter(lambda text: not text.startswith("~"))
tricky = st.sampled_from(
    ["1e-5", "null", "true", "on", "a b", "a: b", "-x", "#x", "'", '"', "\\", "100", "é", "😀", "~x"]
)
odd = st.sampled_from(
    ["a\u00a0b", "a\u200db", "a\ufeffb", " a ", "[1]", "{a}", "*a", "&a", "!a", "%a", "@a", "?", "."]
)
paths = st.one_of(names, tricky, odd)
fractions = st.floats(0, 1, exclude_max=True)
durations = st.one_of(
    st.integers(1, 10**9),
    st.integers(1, 99).map("{}%".format),
    st.decimals("0.001", 100, places=3).map("{}ep".format),
    st.integers(1, 10**6).map("{}ktok".format),
)


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, dict[str, object]]:
    micro, rounds = draw(st.integers(1, 64)), draw(st.integers(1, 64))
    schedule = draw(st.sampled_from(["constant", "cosine", "linear"]))
    share = st.floats(1e-6, 1e6)
    return {
        "model": {
            "path": draw(paths),
            "architecture": draw(st.none() | st.sampled_from(["llama-4-scout-109b", "1e5", "null", "007"])),
            "dtype": draw(st.sampled_from([None, "bfloat16", "float32"])),
        },
        "data": {
            "path": draw(paths),
            "sequence_length": draw(st.integers(1, 10**6)),
            "packing": draw(st.booleans()),
            "validation_split": draw(st.none() | st.floats(0, 0.5)),
        },
        "batch": {
            "global_size": micro * rounds,
            "micro_size": micro,
            "cells": draw(st.just("auto") | st.integers(1, rounds)),
        },
        "optimizer": {
            "learning_rate": draw(st.floats(1e-12, 10)),
            "betas": [draw(fractions), draw(fractions)],
            "eps": draw(st.floats(1e-30, 1)),
            "clip_norm": draw(st.none() | st.floats(1e-9, 1e9)),
            "state_bits": draw(st.sampled_from([8, 32])),
        },
        "schedule": {
            "type": schedule,
            "warmup": draw(st.just(0) | st.integers(1, 99).map("{}%".format)),
            "final": 0 if schedule == "constant" else draw(fractions),
        },
        "memory": {
            "gradient_checkpointing": draw(st.sampled_from([True, False, "auto"])),
            "zero_stage": draw(st.sampled_from(["auto", 0, 1, 2, 3])),
            "shares": draw(st.sampled_from(["memory", "equal"]) | st.lists(share, min_size=1, max_size=4)),
        },
        "report": {"tensorboard": draw(st.booleans())},
        "run": {
            "dir": draw(paths),
            "steps": draw(durations.filter(lambda text: "%" not in str(text))),
            "eval_every": draw(st.none() | durations),
            "hosts": draw(st.none() | paths),
        },
    }


@settings(deadline=None)
@given(recipes())
def test_round_trip(asked: dict[str, dict[str, object]]) -> None:
    try:
        recipe = Recipe.model_validate(asked)
    except ValidationError as error:  # paths may have control characters or no home; nothing else is refused
        refused = {details["loc"][-1] for details in error.errors()}
    else:
        refused = set()
        again = parse_recipe(dump_recipe(recipe), "dumped")
        assert again == recipe
        assert hash(again) == hash(recipe)
    assert refused <= {"path", "dir", "hosts"}


def test_a_recipe_does_not_change(minimal: str) -> None:
    recipe = parse_recipe(minimal, "x")
    with pytest.raises(ValueError, match="frozen"):
        recipe.run.seed = 1


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("recipes/*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_load_and_survive_the_dump(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(dump_recipe(recipe), "dumped") == recipe
    assert recipe.run.dir == Path("runs") / path.stem


def test_the_dump_is_stable(minimal: str) -> None:
    once = dump_recipe(parse_recipe(minimal, "x"))
    assert once == dump_recipe(parse_recipe(once, "y"))
    assert "save_every" not in once  # keys that are null by default are left out
    assert "  learning_rate: 0.001\n" in once


def test_no_clipping_survives_the_dump(minimal: str) -> None:
    recipe = parse_recipe(minimal, "x", ["optimizer.clip_norm=null"])
    assert "clip_norm: null" in dump_recipe(recipe)
    assert parse_recipe(dump_recipe(recipe), "y").optimizer.clip_norm is None


def test_home_is_expanded(minimal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert parse_recipe(minimal, "x", ["run.dir=~/runs"]).run.dir == Path("/somewhere/runs")
    with pytest.raises(UserError):
        parse_recipe(minimal, "x", ["run.dir=~"])  # a bare ~ is YAML's null


@pytest.mark.parametrize("file", ["facts", "ein-langer-Name" * 5, "Fragen über {person} " * 4, "{person}"])
def test_one_persons_recipe_is_written_and_read_again(file: str) -> None:
    text = (REPOSITORY / "recipes/daughter.yaml").read_text()
    asked = [f'evaluation.sets=[{{path: "people/{file}.jsonl", metrics: [loss]}}]', "run.eval_every=10%"]
    recipe = parse_recipe(text, "daughter.yaml", asked)
    own = recipe.model_copy(update={"evaluation": recipe.evaluation.of_person("anna")})
    assert parse_recipe(dump_recipe(own), "theirs") == own
    assert own.evaluation.scores == recipe.evaluation.scores
