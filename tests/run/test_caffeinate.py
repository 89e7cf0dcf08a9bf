"""A Mac stays awake while it trains, with or without a launcher. macOS is played by the name of the platform."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_empire.daughters import command as daughters
from mlx_empire.daughters import work
from mlx_empire.errors import UserError
from mlx_empire.run import caffeinate
from mlx_empire.train import command as train
from mlx_empire.train import story
from mlx_empire.verify import command as verify
from mlx_empire.verify import runs


def test_the_system_is_asked_for_this_process_s_life_and_only_on_macos(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **how: started.append(command))
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    monkeypatch.setattr(sys, "platform", "linux")
    caffeinate.keep_awake()
    monkeypatch.setattr(sys, "platform", "darwin")
    caffeinate.keep_awake()
    assert started == [["/usr/bin/caffeinate", "-is", "-w", str(os.getpid())]]


class AwakeError(UserError):
    """Says that it was asked for, and ends the command there."""


def asked() -> None:
    raise AwakeError("awake")


@pytest.mark.parametrize(
    ("verb", "working", "words"),
    [
        (train, story, ["no.yaml"]),
        (daughters, work, ["no.yaml", "--people", "people", "--work"]),
        (verify, runs, ["no.yaml"]),
    ],
    ids=["train", "daughters", "verify"],
)
def test_whoever_trains_without_a_launcher_stays_awake(
    verb: object,
    working: object,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLX_EMPIRE_BEACON", raising=False)
    monkeypatch.setattr(working, "keep_awake", asked)
    main: Callable[[list[str]], int] = verb.main  # type: ignore[attr-defined]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 64
    assert capsys.readouterr().err == "mlx_empire: awake\n"
