"""What cannot be served is refused before a port is opened, in one line."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
from mlx_lm.utils import save_model
from support.speaking import finish, write_adapter
from support.tiny_models import tiny_config, tiny_model

from mlx_empire.cli import main as cli


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli(["serve", *words])
    assert ended.value.code == 64
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_what_cannot_be_served_is_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no such folder" in refused([str(tmp_path / "nowhere")], capsys)
    assert "no finished daughter is in it" in refused([str(tmp_path)], capsys)
    shutil.copytree(runs / "alice", tmp_path / "runs/alice")
    shutil.copytree(runs / "bob", tmp_path / "runs/bob")
    finish(tmp_path / "runs/bob", tmp_path / "other")
    assert "name the one that is to be served" in refused([str(tmp_path / "runs")], capsys)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port: 127.0.0.1:{port}: " in refused([str(runs), "--port", str(port)], capsys)
    assert "--port: a..b:8080: no name that a machine can have; choose another" in refused(
        [str(runs), "--host", "a..b"], capsys
    )


def test_a_base_whose_table_of_positions_an_answer_could_leave_is_not_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "gpt", tiny_model("gpt2")[0]())
    (tmp_path / "gpt/config.json").write_text(json.dumps(tiny_config("gpt2")))
    write_adapter(tmp_path / "people/alice/final", seed=1)
    finish(tmp_path / "people/alice", tmp_path / "gpt")
    assert "its table of positions has 256 rows" in refused([str(tmp_path / "people")], capsys)


def test_a_base_whose_configuration_mlx_lm_would_read_otherwise_is_not_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "falcon", tiny_model("falcon")[0]())
    (tmp_path / "falcon/config.json").write_text(json.dumps(tiny_config("falcon")))
    write_adapter(tmp_path / "people/alice/final", seed=1)
    finish(tmp_path / "people/alice", tmp_path / "falcon")
    assert "ask it by mlx-empire chat" in refused([str(tmp_path / "people")], capsys)
