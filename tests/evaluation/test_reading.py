"""How held-out rows are read: probabilities are those of the whole model, and text is that of the tokens."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support.stepping import Case, batches_of, trainer_of, weights_of

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.data.batches import MicroBatch
from mlx_empire.data.encode import Document
from mlx_empire.data.rows import Dataset, build_table
from mlx_empire.evaluation import reading
from mlx_empire.evaluation.reading import (
    ReadRow,
    RowReader,
    read_readings,
    token_probabilities,
    write_readings,
)

ROOT = Path(__file__).resolve().parents[2]


def one_row(batch: MicroBatch, row: int) -> MicroBatch:
    documents = None if batch.documents is None else batch.documents[row : row + 1]
    parts = (part[row : row + 1] for part in (batch.inputs, batch.targets, batch.mask))
    return MicroBatch(*parts, documents, (row,))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_probabilities_are_those_of_a_forward_pass_through_the_whole_model(family: str) -> None:
    case = Case(family, micro_batches=3, rows=1)
    rows = [one_row(batch, 0) for batch in batches_of(case)]
    rows[1] = replace(
        rows[1], inputs=rows[1].inputs[:, :9], targets=rows[1].targets[:, :9], mask=rows[1].mask[:, :9]
    )
    comm = SoloCommunicator("here")
    with CommThread() as thread:
        found = token_probabilities(trainer_of(case, comm, thread).streamed, comm, rows, 2)
    model, _, _ = weights_of(case)
    for batch, probabilities in zip(rows, found, strict=True):
        logits = np.array(model(mx.array(batch.inputs)).astype(mx.float32))[0].astype(np.float64)
        whole = np.exp(logits - logits.max(axis=1, keepdims=True))
        whole /= whole.sum(axis=1, keepdims=True)
        expected = whole[np.arange(len(whole)), batch.targets[0]]
        assert probabilities == pytest.approx(expected, rel=2e-5)


def test_what_the_rows_say_is_found_once_and_is_shown_beside_each_reading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rows are the same in every evaluation."""
    documents = [
        Document(f"f:{n}", np.arange(n, n + 4, dtype=np.int32), np.ones(4, np.uint8)) for n in (1, 5)
    ]
    table, _ = build_table(documents, 8, False, False)
    assert table is not None
    asked: list[list[int]] = []

    def decode(ids: Sequence[int]) -> str:
        asked.append(list(ids))
        return "".join(f"<{one}>" for one in ids)

    reader, silent = (RowReader(Dataset(table, 8, False), 2, one) for one in (decode, None))
    first = len(asked)
    found = [np.linspace(0.1, 0.8, 8)] * 2
    monkeypatch.setattr(reading, "token_probabilities", lambda *words: found)
    rows, again = (reader.read(None, SoloCommunicator("here"), 1) for _ in range(2))  # type: ignore[arg-type]
    assert rows == again
    assert len(asked) == first
    assert sorted(row.tokens for row in rows) == [[f"<{m}>" for m in range(n, n + 4)] for n in (1, 5)]
    assert all(row.probabilities == [None, 0.1, 0.2, 0.3] for row in rows)
    assert all(row.counted == [False, True, True, True] for row in rows)
    assert silent.read(None, SoloCommunicator("here"), 1) == []  # type: ignore[arg-type]


def test_the_first_reading_stays_beside_the_last(tmp_path: Path) -> None:
    for step, probability in ((0, 0.1), (5, 0.5), (9, 0.9)):
        write_readings(tmp_path, step, [ReadRow(["a", "b"], [None, probability], [False, True])])
    assert stat.S_IMODE((tmp_path / "samples.json").stat().st_mode) == 0o600
    found = read_readings(tmp_path)
    assert found is not None
    told = [(found[at]["step"], found[at]["texts"][0]["probabilities"]) for at in ("first", "last")]
    assert told == [(0, [None, 0.1]), (9, [None, 0.9])]
    for damaged in ("", "[]", '{"first": {}}', json.dumps({"first": {"step": 1, "texts": [3]}, "last": 1})):
        (tmp_path / "samples.json").write_text(damaged)
        assert read_readings(tmp_path) is None


@pytest.mark.slow
def test_a_run_reads_the_same_on_one_rank_and_on_two_and_reading_changes_no_bit(tmp_path: Path) -> None:
    words = ["run.steps=4", "run.eval_every=2", "data.sequence_length=64"]

    def train(name: str, *more: str, ranks: int = 1) -> Path:
        command = [sys.executable, "-m", "mlx_empire.train", "recipes/tiny.yaml", *words, *more]
        launcher = ["mpirun", "-n", str(ranks), "--oversubscribe"] if ranks > 1 else []
        subprocess.run(
            [*launcher, *command, f"run.dir={tmp_path / name}"], cwd=ROOT, check=True, capture_output=True,
            env=os.environ | {"MLX_EMPIRE_CACHE": str(tmp_path / "cache")},
        )  # fmt: skip
        return tmp_path / name

    alone, both = train("alone", "report.samples=3"), train("both", "report.samples=3", ranks=2)
    unread = train("unread")
    found = read_readings(alone)
    assert found is not None
    assert found == read_readings(both)
    assert [found[at]["step"] for at in ("first", "last")] == [0, 4]
    assert len(found["last"]["texts"]) == 3
    assert not (unread / "samples.json").exists()
    weights = [(run / "final" / "model.safetensors.index.json").parent for run in (alone, unread)]
    files = [sorted(folder.glob("*.safetensors")) for folder in weights]
    assert [one.read_bytes() for one in files[0]] == [one.read_bytes() for one in files[1]]
