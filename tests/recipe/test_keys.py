"""`mlx-empire keys`: what docs/keys.md says, on the terminal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlx_empire.keys import main

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "keys.md").read_text()
ROWS = [
    [cell.replace("\\|", "|") for cell in re.split(r"(?<!\\) \| ", row[2:-2])]
    for row in PAGE.splitlines()
    if row.startswith("| `")
]


def test_every_key_of_the_page_is_told_with_its_default_and_its_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 0
    expected = [
        f"{key.strip('`')}: {default}\n    {decides}\n    {accepts}\n"
        for key, accepts, default, decides in ROWS
    ]
    assert len(expected) > 60
    assert capsys.readouterr().out == "".join(expected)


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("run.save_every", {"run.save_every"}),
        ("SAVE-every", {"run.save_every"}),
        ("--learning-rate", {"optimizer.learning_rate"}),
        ("--max-seq-length", {"data.sequence_length"}),
        ("schedule", {"schedule.type", "schedule.warmup", "schedule.final"}),
        ("tensorboardX", {"report.tensorboard"}),
    ],
)
def test_a_word_finds_keys(pattern: str, keys: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([pattern]) == 0
    assert set(re.findall(r"^([a-z_]+\.[a-z_]+): ", capsys.readouterr().out, re.M)) == keys


def test_a_word_that_is_nowhere_is_refused_with_the_nearest_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["optimizer.lerning_rate"])
    assert ended.value.code == 64
    assert capsys.readouterr().err == (
        "mlx_empire: 'optimizer.lerning_rate': is in no key of a recipe; did you mean optimizer.learning_rate?\n"
    )
