"""What tokenising holds does not grow with the data: the resident memory of a process that reads more and more."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

MIB = 2**20
MOST_GROWTH = (
    96 * MIB
)  # another batch of a megabyte, which comes ahead; without an end to batches it is 300 MiB
MOST_OF_WINDOWS = 128 * MIB  # with the place of each token, half a million characters at once
READS = """\
import resource, sys
from pathlib import Path
from mlx_empire.data.splits import load_splits
for path in sys.argv[2:]:
    load_splits(path=path, sequence_length=256, packing=True, tokenizer_folder=Path(sys.argv[1]))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024), flush=True)
"""


def test_more_data_take_no_more_memory(tmp_path: Path, tokenizer_folder: Path, own_cache: Path) -> None:
    rng = random.Random(3)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(2, 9))) for _ in range(400)]

    def text() -> str:
        return " ".join(rng.choices(words, k=4000))  # 25,000 characters: 256 of them are six megabytes

    for name, rows in (("little", 40), ("much", 200)):
        lines = (json.dumps({"text": text()}) + "\n" for _ in range(rows))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "one.txt").write_text(" ".join(text() for _ in range(150)))
    files = [str(tmp_path / name) for name in ("little.jsonl", "much.jsonl", "one.txt")]
    assert Path(files[1]).stat().st_size > 4.5 * Path(files[0]).stat().st_size
    told = subprocess.run(
        [sys.executable, "-c", READS, str(tokenizer_folder), *files],
        env={**os.environ, "MLX_EMPIRE_CACHE": str(own_cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    little, much, one = map(int, told.stdout.split())
    assert much - little < MOST_GROWTH
    assert one - little < MOST_OF_WINDOWS
