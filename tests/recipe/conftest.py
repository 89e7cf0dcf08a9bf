"""A small valid recipe that the tests damage."""

import pytest

MINIMAL = """\
model:
  path: models/tiny
data:
  path: data/tiny
  sequence_length: 16
batch:
  global_size: 8
optimizer:
  learning_rate: 1e-3
run:
  dir: runs/tiny
  steps: 10
"""


@pytest.fixture
def minimal() -> str:
    return MINIMAL
