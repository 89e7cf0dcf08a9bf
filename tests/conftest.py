"""Makes `support` importable (pytest's importlib mode leaves sys.path alone); property tests have no deadline; the
files that need most time are begun first.

Everything computes on the CPU, here and in the processes that tests start: bits are compared, and ledgers that were
fitted there. MLX_EMPIRE_TEST_GPU=1 leaves the choice to MLX.
"""

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

if os.environ.get("MLX_EMPIRE_TEST_GPU") != "1":
    os.environ["MLX_EMPIRE_DEVICE"] = "cpu"
# Hundreds of processes import the package: whoever wants no caches of compiled code would compile it in each of them.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A suite that a shell begins in the background ignores Ctrl-C, and so would whatever it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))
import support  # noqa: E402, F401  chooses the device

settings.register_profile("loaded machine", deadline=None)
settings.load_profile("loaded machine")

# Ten seconds to some minutes of a core each: begun last, one would run while the other processes have nothing to do.
HEAVY = (
    "engine/test_predicted_peaks.py",
    "engine/test_across_ranks.py",
    "engine/test_memory.py",
    "train/test_daughters.py",
    "train/test_adapters.py",
    "faults/test_resume.py",
    "adapters/test_steps.py",
    "train/test_ranks.py",
    "oracle/test_oracle.py",
    "faults/test_kills.py",
    "train/test_evaluation.py",
    "capacity/test_matrix.py",
    "adapters/test_across_ranks.py",
    "capacity/test_advice.py",
    "verify/test_command.py",
    "train/test_daughters_gates.py",
    "faults/test_damage.py",
    "reliability/test_start.py",
    "launch/test_stopping.py",
    "reliability/test_rollback.py",
)
PLACES = {TESTS / name: place for place, name in enumerate(HEAVY)}


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One cache of tokens for whatever this run of the suite starts: each first reading of texts imports transformers,
    which takes longer than most of the runs. Tests about the cache have their own."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["MLX_EMPIRE_CACHE"] = str(shared / "cache")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a file stay together, in their order; the other files keep theirs."""
    items.sort(key=lambda item: PLACES.get(item.path, len(PLACES)))
