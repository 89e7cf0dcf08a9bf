"""mlx-lm's modules without its tokenizers: the same classes, and the package is whole for whoever asks for more."""

from __future__ import annotations

import json
import subprocess
import sys

import mlx_lm.utils
import pytest
from support.every_module import names
from support.mpi import ROOT

from mlx_empire.model.mlx_lm_modules import BY_ARCHITECTURE, REMAPPED, classes_of

SCRIPT = """
import json, sys
import mlx.nn as nn
import mlx_empire.train.story, mlx_empire.capacity.answer
from mlx_empire.model.mlx_lm_modules import put_adapters_in
model = nn.Module()
model.layers = [nn.Module(), nn.Module()]
for layer in model.layers:
    layer.projection = nn.Linear(64, 64)
put_adapters_in(model, 1, {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["projection"]}, False)
kinds = [type(layer.projection).__name__ for layer in model.layers]
early = [name for name in ("transformers", "huggingface_hub", "mlx_lm.utils") if name in sys.modules]
import mlx_lm
from mlx_lm import fuse
from mlx_lm.tuner import train
from mlx_lm.tuner.utils import print_trainable_parameters
print_trainable_parameters(model)
whole = [mlx_lm.__version__, callable(mlx_lm.load), callable(mlx_lm.generate), callable(train)]
print(json.dumps([early, kinds, *whole]))
"""


def test_tables_are_those_of_mlx_lm() -> None:
    assert REMAPPED == mlx_lm.utils.MODEL_REMAPPING
    assert BY_ARCHITECTURE == mlx_lm.utils.MODEL_ARCHITECTURE_REMAPPING


@pytest.mark.parametrize(
    "architectures", [None, "BailingMoeV3ForCausalLM", ["Other", "BailingMoeV3ForCausalLM"]]
)
def test_classes_are_those_that_mlx_lm_finds(architectures: str | list[str] | None) -> None:
    for kind in [*names(), *REMAPPED, "bailing_hybrid"]:
        config = {"model_type": kind, "architectures": architectures}
        assert classes_of(config) == mlx_lm.utils._get_classes(config)


def test_a_kind_that_mlx_lm_does_not_have_is_said_as_it_says_it() -> None:
    said = []
    for find in (classes_of, mlx_lm.utils._get_classes):
        with pytest.raises(ValueError, match="not supported") as raised:
            find({"model_type": "nobody"})
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_commands_start_without_tokenizers_and_the_package_is_whole_for_others() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *_, printed, last = ended.stdout.splitlines()
    assert "(0.009M/0.008M)" in printed  # with the adapter, of what the base has
    kinds = ["Linear", "LoRALinear"]
    assert json.loads(last) == [[], kinds, mlx_lm.__version__, True, True, True]
