"""The folder in which a module's commands run, with the recipe of `train.launching`."""

import pytest
from train.launching import RECIPE, Workspace, jsonl


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    made = Workspace(tmp_path_factory.mktemp("reliability"))
    made.write("recipe.yaml", RECIPE)
    made.write("rows.jsonl", jsonl({"tokens": [(7 * i + j) % 500 for j in range(65)]} for i in range(24)))
    return made
