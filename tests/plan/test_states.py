"""The formula for optimizer states against the optimizer's own answer."""

import itertools

import pytest

from mlx_empire.optim.choose import make_optimizer
from mlx_empire.plan.states import planned_state_bytes
from mlx_empire.recipe.sections import OptimizerSection


def section(**settings):
    return OptimizerSection.model_validate({"learning_rate": 1e-5, **settings}, context={"planned": True})


CASES = itertools.product(
    ("adamw", "lion", "sgd"),
    (8, 32),
    ("exact", "diet", "fp32", "none"),
    ("bfloat16", "float32"),
    (True, False),
)


@pytest.mark.parametrize(("name", "bits", "master", "dtype", "quantised"), [*CASES])
def test_the_optimizer_answers_the_same(name, bits, master, dtype, quantised):
    asked = section(name=name, state_bits=bits, master_weights=master)
    ours = planned_state_bytes(asked)(6400, dtype, quantised=quantised)
    assert ours == dict(make_optimizer(asked).state_bytes(6400, dtype, quantised=quantised))


@pytest.mark.parametrize(("master", "per_element"), [("exact", 2), ("diet", 1), ("fp32", 4), ("none", 0)])
def test_bytes_of_masters(master, per_element):
    sizes = planned_state_bytes(section(state_bits=8, master_weights=master))(640, "bfloat16", quantised=True)
    kept = [size for name, size in sizes.items() if "remainder" in name or name == "master"]
    assert sum(kept) == 640 * per_element
    assert sum(sizes.values()) == 640 * (2 + per_element) + 10 * 5
