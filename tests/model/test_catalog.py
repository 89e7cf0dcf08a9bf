"""The catalog's entries against published parameter counts, which mlx-lm's lazily built models must reproduce."""

import pytest

from mlx_empire.errors import UserError
from mlx_empire.model import catalog
from mlx_empire.model.build import build_model, compute_dtype, describe

NOT_IN_MLX_LM = ("falcon-180b", "falcon-40b", "falcon-7b", "olmo-7b-instruct")


@pytest.mark.parametrize("name", [n for n in catalog.names() if n not in NOT_IN_MLX_LM])
def test_parameter_counts_are_the_published_ones(name):
    config, facts = catalog.load(name)
    spec = describe(build_model(config, name), config, name, compute_dtype(config, None))
    assert spec.parameters == facts["text_parameters"]


@pytest.mark.parametrize("name", NOT_IN_MLX_LM)
def test_what_mlx_lm_lacks_is_refused(name):
    with pytest.raises(UserError, match="cannot build"):
        build_model(catalog.load(name)[0], name)


def test_unknown_names_get_the_nearest():
    with pytest.raises(UserError, match=r"did you mean llama-4-scout-109b\?"):
        catalog.load("llama-4-scout")
