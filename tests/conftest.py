"""Makes `support` importable (pytest's importlib mode leaves sys.path alone); property tests have no deadline.

Everything computes on the CPU, here and in the processes that tests start: bits are compared, and ledgers that were
fitted there. MLX_EMPIRE_TEST_GPU=1 leaves the choice to MLX; what is meant for a GPU is `make test-gpu`.
"""

import os
import sys
from pathlib import Path

from hypothesis import settings

if os.environ.get("MLX_EMPIRE_TEST_GPU") != "1":
    os.environ["MLX_EMPIRE_DEVICE"] = "cpu"

sys.path.insert(0, str(Path(__file__).parent))
import support  # noqa: F401  chooses the device

settings.register_profile("loaded machine", deadline=None)
settings.load_profile("loaded machine")
