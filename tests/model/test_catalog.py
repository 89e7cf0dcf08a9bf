"""The catalog's entries against published parameter counts, which mlx-lm's lazily built models must reproduce."""

import pytest

from mlx_empire.errors import UserError
from mlx_empire.model import catalog
from mlx_empire.model.build import build_model, compute_dtype, describe


@pytest.mark.parametrize("name", catalog.names())
def test_parameter_counts_are_the_published_ones(name):
    config, facts = catalog.load(name)
    spec = describe(build_model(config, name), config, name, compute_dtype(config, None))
    assert spec.parameters == facts["text_parameters"]


def test_unknown_names_get_the_nearest():
    with pytest.raises(UserError, match=r"did you mean llama-4-scout-109b\?"):
        catalog.load("llama-4-scout")
