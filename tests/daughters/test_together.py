"""How many daughters a machine trains together, also where their adapters may not stand in one model."""

from __future__ import annotations

from pathlib import Path

import mlx.nn as nn
import pytest
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear
from mlx_lm.tuner.lora import LoRASwitchLinear
from train.test_daughters_kinds import save_mixture

from mlx_empire.cluster.hostfile import Node
from mlx_empire.daughters import machine
from mlx_empire.model import together
from mlx_empire.recipe.load import parse_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.sizes import GIB

NODE = Node("here", 1, None, 8 * GIB, 6 * GIB)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    save_mixture(tmp_path)
    text = f"""
model: {{path: {tmp_path}, dtype: float32}}
tuning: {{type: lora, rank: 4, targets: [experts, embed_tokens]}}
data: {{path: people, format: tokens, sequence_length: 64}}
batch: {{global_size: 2, micro_size: 1}}
optimizer: {{learning_rate: 1.0e-3}}
run: {{dir: runs, steps: 4}}
"""
    return parse_recipe(text, "recipe.yaml")


class Odd(nn.Module):
    """Calls stacked experts as nobody else does."""

    def __init__(self) -> None:
        super().__init__()
        self.up = LoRASwitchLinear.from_base(SwitchLinear(8, 8, 2))


def test_experts_in_a_module_that_nobody_knows_go_alone() -> None:
    model = nn.Module()
    model.mlp = SwitchGLU(8, 8, 2)
    model.mlp.up_proj = LoRASwitchLinear.from_base(model.mlp.up_proj)
    assert together.why_alone(model) is None
    model.odd = Odd()
    assert together.why_alone(model) == "odd.up are stacked experts that Odd calls in a way of its own"


def test_what_cannot_be_put_together_goes_one_after_another_and_it_is_said(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three where all fits, the ledger counting each one's adapter; else one, as if it were asked for alone."""
    one, three = (machine.capacity_for(recipe, NODE, most) for most in (1, 3))
    assert (one.places, three.places) == (1, 3)
    assert three.plan.ledgers[0].peak > one.plan.ledgers[0].peak
    assert machine.notes_on(recipe) == []
    monkeypatch.setattr(together, "_HOLDERS", ())
    alone = machine.capacity_for(recipe, NODE, 3)
    assert alone.places == 1
    (note,) = machine.notes_on(recipe)
    assert note.startswith("tuning.targets: model.layers.")
    assert note.endswith(
        "are stacked experts that SwitchGLU calls in a way of its own, so daughters are trained one after another"
    )
