"""A recipe that is only planned may ask for what is not built yet, and says so."""

from typing import Annotated, Literal

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from mlx_empire.errors import UserError
from mlx_empire.recipe import planned
from mlx_empire.recipe.load import dump_recipe, parse_recipe
from mlx_empire.recipe.planned import not_built
from mlx_empire.recipe.schema import BuiltToday

TEXT = """
model: {path: m}
data: {path: d, sequence_length: 16}
batch: {global_size: 8}
optimizer: {learning_rate: 1e-5}
run: {dir: r, steps: 10}
"""
PLANNED = ["tuning.type=qlora", "tuning.rank=16", "tuning.bits=ternary", "tuning.targets=[q_proj, experts]"]


# Every value of today's schema is built; this is how one would be marked that is not.
FUTURE = Annotated[Literal["full", "lora", "magic"], BuiltToday(("full", "lora"))]


def test_what_is_not_built_passes_where_it_is_planned():
    adapter = TypeAdapter(FUTURE)
    assert adapter.validate_python("lora") == "lora"
    assert adapter.validate_python("magic", context={"planned": True}) == "magic"
    with pytest.raises(ValidationError, match="magic is not built yet; use full or lora"):
        adapter.validate_python("magic")


def test_what_is_not_built_is_listed(monkeypatch):
    recipe = parse_recipe(TEXT, "x.yaml", PLANNED, planned=True)
    assert (recipe.tuning.rank, recipe.tuning.targets) == (16, ("q_proj", "experts"))
    assert parse_recipe(dump_recipe(recipe), "y.yaml", planned=True) == recipe
    assert not_built(recipe) == {}
    fields = {"tuning.type": FieldInfo.from_annotation(FUTURE), "run.seed": FieldInfo()}
    monkeypatch.setattr(planned, "leaf_fields", lambda: fields)
    assert not_built(recipe) == {"tuning.type": "qlora"}
    assert not_built(parse_recipe(TEXT, "x.yaml")) == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tuning.rank=0", "tuning.rank: got 0; expected a whole number"),
        ("tuning.rank=many", "tuning.rank: got 'many'"),
        ("tuning.bits=5", r"tuning.bits: got 5; expected 2, 3, 4, 6, 8, ternary, mxfp4.*did you mean"),
        ("tuning.dropout=1", "tuning.dropout: got 1"),
        ("tuning.targets=[]", "tuning.targets"),
        ("tuning.bits=4", "bits 4 has no meaning for type lora; use type qlora"),
        ("data.sequence_length=-16", "data.sequence_length: got -16"),
    ],
)
def test_planned_values_are_checked_all_the_same(override, message):
    with pytest.raises(UserError, match=message) as error:
        parse_recipe(TEXT, "x.yaml", ["tuning.type=lora", override], planned=True)
    assert "\n" not in str(error.value)
