"""Makes `support` importable (pytest's importlib mode leaves sys.path alone); property tests have no deadline."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
settings.register_profile("loaded machine", deadline=None)
settings.load_profile("loaded machine")
