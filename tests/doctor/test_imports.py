"""Help and usage errors of `doctor` and `fetch` wait for no library."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("mlx.core", "mlx_lm", "transformers", "huggingface_hub", "mpi4py")
ASK = f"""
import sys
from mlx_empire.doctor import command as doctor
from mlx_empire.fetch import command as fetch
for verb in (doctor, fetch):
    for words in (["--help"], ["--nonsense"]):
        try:
            verb.main(words)
        except SystemExit as error:
            print(error.code)
print([name for name in {HEAVY} if name in sys.modules])
"""


def test_help_and_wrong_usage_import_neither_mlx_nor_the_hub() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ASK], capture_output=True, text=True, timeout=60, check=True
    )
    said = ended.stdout.splitlines()
    assert [line for line in said if line in ("0", "64")] == ["0", "64", "0", "64"]
    assert said[-1] == "[]"
