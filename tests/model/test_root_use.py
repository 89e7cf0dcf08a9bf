"""What the head and the embedding use of the root: the closed form of plans against the model's own answer."""

from dataclasses import replace

import pytest
from support.tiny_models import FAMILIES, OTHER_FAMILIES, tiny_config

from mlx_empire.engine.streamable import verify_scaled_down
from mlx_empire.model.closed_forms import looked_up, root_use
from mlx_empire.model.target import make_target
from mlx_empire.recipe.sections import TuningSection

TABLES = {"gpt2": "wte", "mamba2": "embeddings"}
DAILY = ("llama", "gpt2")  # one embedding; and another for positions, which the head does not use


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in DAILY else pytest.mark.slow)
        for family in (*FAMILIES, *OTHER_FAMILIES)
    ],
)
def test_by_names_and_shapes_it_is_what_the_scaled_down_model_shows(family):
    """Embedding and head as one tensor and as two, trained themselves and through adapters."""
    config = tiny_config(family) | {"tie_word_embeddings": family in FAMILIES}
    shown = verify_scaled_down(config, family)
    assert shown.head
    assert shown.embed
    table = TABLES.get(family, "embed_tokens")
    for tuning in (
        {"type": "full"},
        {"type": "lora", "targets": [table]},
        {"type": "qlora", "targets": [table]},
    ):
        spec = make_target(config, TuningSection.model_validate(tuning), family, "float32").spec
        head, embed = root_use(spec)
        assert embed > 0
        assert root_use(replace(spec, root_names=shown)) == (head, embed)
        assert looked_up(replace(spec, root_names=shown)) == looked_up(spec)
        assert (looked_up(spec) is None) == (tuning["type"] != "full")


def test_another_answer_of_the_model_is_heard():
    config = tiny_config("llama") | {"tie_word_embeddings": True}
    spec = make_target(config, TuningSection(type="full"), "llama", "float32").spec
    shown = verify_scaled_down(config, "llama")
    apart = replace(shown, head=tuple(name for name in shown.head if name not in shown.embed))
    tied, separate = (root_use(replace(spec, root_names=names)) for names in (shown, apart))
    assert tied[0] - separate[0] == tied[1] == separate[1]
