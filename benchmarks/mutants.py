"""Which faults the daily tests see: `python benchmarks/mutants.py [--only WORD] [--page docs/mutants.md]`.

Each mutant is one changed line in a copy of the checkout; the tests beside it, of those that `make test` runs, are run
there and must fail. The same tests are run once on the copy as it is, where they must pass. What survives ends the
command with 1. It takes some minutes of a core for each of them that trains.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HEAD = """\
# Changed lines that the daily tests see

Part of [the README](../README.md). `make mutants` writes it: one line after another is changed in a copy of the
checkout, and the tests beside it, of those that `make test` runs, must fail. On the copy as it is they must pass.

"""
COPIED = ("mlx_empire", "tests", "recipes", "hosts", "docs", "benchmarks", "pyproject.toml", "README.md")


class Mutant(NamedTuple):
    """What goes wrong, where, and which tests should say so."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "AdamW squares the gradient wrongly",
        "optim/adamw.py",
        "rest2 * (g * g)",
        "rest2 * mx.abs(g)",
        ("tests/optim/test_adamw.py",),
    ),
    Mutant(
        "AdamW's first moment is not corrected",
        "optim/adamw.py",
        "lr / first, 1 / second",
        "lr, 1 / second",
        ("tests/optim/test_adamw.py",),
    ),
    Mutant(
        "contributions are added in reverse",
        "comm/buffers.py",
        "for pieces in contributions:",
        "for pieces in reversed(contributions):",
        ("tests/comm/test_accumulate.py",),
    ),
    Mutant(
        "the loss is divided by the next step's targets",
        "run/job.py",
        "return valid_tokens(self.data, self.order, step - 1,",
        "return valid_tokens(self.data, self.order, step,",
        ("tests/run/test_job.py",),
    ),
    Mutant(
        "the loss is not divided by the step's targets",
        "model/head_loss.py",
        "(mask / total)[..., None]",
        "mask[..., None]",
        ("tests/engine/test_loss.py",),
    ),
    Mutant(
        "a tensor's digest in a checkpoint is not compared",
        "checkpoint/shard.py",
        "if found != piece.digest:",
        "if False:",
        ("tests/checkpoint/test_shard.py",),
    ),
    Mutant(
        "documents of a packed row see one another by the mask",
        "model/layers.py",
        "combine(given_mask(layer, given), same_document(documents))",
        "given_mask(layer, given)",
        ("tests/engine/test_across_ranks.py",),
    ),
    Mutant(
        "documents of a long packed row see one another",
        "model/attention/patterns.py",
        "*(self.cuts[row] if self.cuts else ())",
        "*()",
        ("tests/model/test_attention.py", "tests/model/test_patterns.py"),
    ),
    Mutant(
        "an adapter's scale is not divided by its rank",
        "model/lora.py",
        "else alpha / rank",
        "else alpha",
        ("tests/model/test_tuning.py", "tests/adapters/test_layers.py"),
    ),
    Mutant(
        "the ledger counts gradients at half their size",
        "plan/step_bytes.py",
        'self._hold("gradients", 4 * size.trained)',
        'self._hold("gradients", 2 * size.trained)',
        ("tests/oracle/test_oracle.py",),
    ),
    Mutant(
        "a cell's micro-batches are added in the wire's dtype",
        "engine/gradients.py",
        "a.astype(mx.float32) + g.astype(mx.float32)",
        "a + g",
        ("tests/engine/test_bfloat16_gradients.py",),
    ),
    Mutant(
        "an exact match forgives one token",
        "evaluation/evaluator.py",
        "rows[:, 1] == rows[:, 2]",
        "rows[:, 1] >= rows[:, 2] - 1",
        ("tests/evaluation/test_answers.py", "tests/evaluation/test_gate.py"),
    ),
    Mutant(
        "a buddy's copy is not read back",
        "checkpoint/copies.py",
        "(damage := problem_with(copy.path, shards[source]))",
        "(damage := None)",
        ("tests/checkpoint/test_copies.py",),
    ),
    Mutant(
        "a unit is reduced after every wave of a cell",
        "plan/schedule.py",
        "if not self._shape.trained[unit] or not part.last:",
        "if not self._shape.trained[unit]:",
        ("tests/plan/test_schedule.py",),
    ),
    Mutant(
        "a cell more than there is contributes",
        "plan/workload.py",
        "return [round_index * self.world_size + r < self.cells for r",
        "return [round_index * self.world_size + r <= self.cells for r",
        ("tests/plan/test_cells_and_shares.py",),
    ),
    Mutant(
        "a source reads its rows in the order of another one's next epoch",
        "data/order.py",
        "source * EPOCHS_PER_SOURCE + epoch",
        "source + epoch",
        ("tests/data/test_order.py", "tests/data/test_mixture.py"),
    ),
)


def main(words: Sequence[str] | None = None) -> int:
    """0 where all that was chosen is seen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="mutants whose words or file contain this")
    parser.add_argument("--page", type=Path, help="where the table goes")
    options = parser.parse_args(words)
    chosen = [m for m in MUTANTS if options.only in m.what or options.only in m.file]
    if not chosen:
        parser.error(f"--only {options.only}: is in no mutant's words or file")
    with tempfile.TemporaryDirectory(prefix="mutants-") as made:
        folder = Path(made)
        for name in COPIED:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
        sound = run_tests(folder, sorted({test for m in chosen for test in m.tests}))
        assert sound == 0, f"these tests do not pass as it is: exit code {sound}"
        rows = [(mutant, seen_in(folder, mutant)) for mutant in chosen]
    for mutant, seen in rows:
        print(f"{'seen' if seen else 'SURVIVES'}  {mutant.what} ({mutant.file})")
    if options.page:
        options.page.write_text(page(rows))
    return int(not all(seen for _, seen in rows))


def seen_in(folder: Path, mutant: Mutant) -> bool:
    """Whether its tests fail on the copy with the mutant's line."""
    file = folder / "mlx_empire" / mutant.file
    text = file.read_text()
    assert text.count(mutant.old) == 1, (
        f"{mutant.file}: {mutant.old!r} stands there {text.count(mutant.old)} times"
    )
    file.write_text(text.replace(mutant.old, mutant.new))
    try:
        return run_tests(folder, mutant.tests) == 1
    finally:
        file.write_text(text)


def run_tests(folder: Path, tests: Sequence[str]) -> int:
    """pytest's exit code: 0 where all pass, 1 where one fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False).returncode


def page(rows: Sequence[tuple[Mutant, bool]]) -> str:
    """docs/mutants.md: the table of what was seen."""
    lines = ["| changed line | in | seen by |", "|---|---|---|"]
    for mutant, seen in rows:
        by = ", ".join(f"`{test}`" for test in mutant.tests) if seen else "**nothing**"
        lines.append(f"| {mutant.what} | `{mutant.file}` | {by} |")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
