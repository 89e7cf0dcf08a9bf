"""Closed forms and active parameters against published counts."""

import pytest

from mlx_empire.model import catalog
from mlx_empire.model.build import build_model, describe
from mlx_empire.model.closed_forms import active_parameters


@pytest.mark.parametrize("name", catalog.names())
def test_active_and_total_parameters_are_the_published_ones(name):
    config, facts = catalog.load(name)
    spec = describe(build_model(config, name), config, name, "bfloat16")
    assert spec.parameters == facts["text_parameters"]
    assert active_parameters(spec) == facts["active_parameters"]


def test_the_published_checkpoint_of_falcon_180b_has_its_head_apart():
    config, facts = catalog.load("falcon-180b")
    untied = {**config, "tie_word_embeddings": False}
    spec = describe(build_model(untied, "falcon-180b"), untied, "falcon-180b", "bfloat16")
    assert spec.parameters == facts["published_exact"]
