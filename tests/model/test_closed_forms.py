"""Closed forms and active parameters against published counts."""

import pytest

from mlx_empire.errors import UserError
from mlx_empire.model import catalog
from mlx_empire.model.build import build_model, describe
from mlx_empire.model.closed_forms import active_parameters, counted_spec, has_closed_form


@pytest.mark.parametrize("name", catalog.names())
def test_active_and_total_parameters_are_the_published_ones(name):
    config, facts = catalog.load(name)
    if has_closed_form(config):
        spec = counted_spec(config, name, "bfloat16")
    else:
        spec = describe(build_model(config, name), config, name, "bfloat16")
    assert spec.parameters == facts["text_parameters"]
    assert active_parameters(spec) == facts["active_parameters"]


def test_the_published_checkpoint_of_falcon_180b_has_its_head_apart():
    config, facts = catalog.load("falcon-180b")
    spec = counted_spec({**config, "tie_word_embeddings": False}, "falcon-180b", "bfloat16")
    assert spec.parameters == facts["published_exact"]


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": "wide"}, {"num_hidden_layers": 0}, {"vocab_size": -1}, {"num_attention_heads": None}],
)
def test_a_damaged_configuration_is_refused_in_one_line(change):
    config, _ = catalog.load("olmo-7b-instruct")
    with pytest.raises(UserError, match="cannot be counted") as error:
        counted_spec({**config, **change}, "some/folder", "bfloat16")
    assert "\n" not in str(error.value)
