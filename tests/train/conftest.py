"""Runs that several test files look at, each made once."""

from pathlib import Path

import pytest
from train.launching import RECIPE, Outcome, Workspace, succeeded


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    made = Workspace(tmp_path_factory.mktemp("train"))
    made.write("recipe.yaml", RECIPE)
    return made


@pytest.fixture(scope="session")
def alone(workspace: Workspace) -> Outcome:
    """The run that all others are compared with: one process, two evaluations, under the most careless umask."""
    return succeeded(workspace.train("recipe.yaml", "run.dir=alone", "run.eval_every=3", umask=0))


@pytest.fixture(scope="session")
def alone_dir(workspace: Workspace, alone: Outcome) -> Path:
    return workspace.folder / "alone"
