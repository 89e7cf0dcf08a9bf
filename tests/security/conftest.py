"""The folder in which a module's commands run, with the recipe of `train.launching`."""

import pytest
from train.launching import RECIPE, Workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    made = Workspace(tmp_path_factory.mktemp("security"))
    made.write("recipe.yaml", RECIPE)
    return made
