"""A recipe and hostfiles as a user would write them, and the command run in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlx_empire.capacity import command as capacity

MODEL = Path(__file__).resolve().parents[1] / "fixtures" / "tiny-llama-260k"
RECIPE = f"""\
model: {{path: {MODEL}, dtype: float32}}
data: {{path: nowhere, sequence_length: 64}}
batch: {{global_size: 4, micro_size: 1}}
optimizer: {{learning_rate: 1.0e-3}}
memory: {{gradient_checkpointing: true, zero_stage: 0, gradient_dtype: float32}}
run: {{dir: run, steps: 3}}
"""


@dataclass(frozen=True)
class Said:
    """What a command did: exit code, and what it said where."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs `python -m mlx_empire.capacity ARGUMENTS` in this process."""

    def run(*arguments: object) -> Said:
        words: Sequence[str] = [str(word) for word in arguments]
        try:
            code = capacity.main(words)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return run


@pytest.fixture
def hosts(tmp_path: Path) -> Callable[..., Path]:
    """Writes a hostfile of these lines."""

    def write(*lines: str) -> Path:
        path = tmp_path / "hosts.txt"
        path.write_text("".join(line + "\n" for line in lines))
        return path

    return write
