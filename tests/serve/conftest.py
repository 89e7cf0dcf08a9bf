"""People, and a server that runs in this process: each made once for a file of tests."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_lm.server
import pytest
from serve.asking import PEOPLE, Asked
from support.speaking import finish, write_adapter

from mlx_empire.serve.command import read
from mlx_empire.serve.people import people_in
from mlx_empire.serve.server import Server, serve


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four finished daughters, one of whom has two generations, one that is not finished, and what is none."""
    folder = tmp_path_factory.mktemp("serve") / "people"
    for name, about in PEOPLE.items():
        write_adapter(folder / name / "final", **about)
        finish(folder / name)
    write_adapter(folder / "dora/generations/2/final", seed=500)
    finish(folder / "dora/generations/2")
    (folder / "dora/current").symlink_to("generations/2/final")
    write_adapter(folder / "late/final", seed=600)
    finish(folder / "late")
    (folder / "late/COMPLETE").unlink()
    (folder / "notes").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[Asked]:
    loads: list[str] = []
    real = mlx_lm.server.load

    def counted(path: str, *words: Any, **options: Any) -> Any:
        loads.append(str(path))
        return real(path, *words, **options)

    mlx_lm.server.load = counted
    options: argparse.Namespace = read([str(runs), "--port", "0"])
    with Server(options.host, options.port) as made:
        thread = threading.Thread(target=serve, args=(made, people_in(runs, None), options))
        thread.start()
        yield Asked(made, loads)
        made.shutdown()
        thread.join()
    mlx_lm.server.load = real
