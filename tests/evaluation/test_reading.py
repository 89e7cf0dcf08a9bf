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
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from support.planning import llama_like, node_of, recipe_of
from support.stepping import Case, batches_of, trainer_of, weights_of

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.data.batches import MicroBatch
from mlx_empire.data.encode import Document
from mlx_empire.data.rows import Dataset, build_table
from mlx_empire.evaluation import reading
from mlx_empire.evaluation.generation import holds_whole
from mlx_empire.evaluation.reading import (
    Continuation,
    ReadRow,
    RowReader,
    read_readings,
    split_at_prompt,
    token_probabilities,
    write_readings,
)
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.resolve import resolve

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
    trainer: Any = SimpleNamespace(streamed=None)
    rows, again = (reader.read(trainer, SoloCommunicator("here"), 1) for _ in range(2))
    assert rows == again
    assert len(asked) == first
    assert sorted(row.tokens for row in rows) == [[f"<{m}>" for m in range(n, n + 4)] for n in (1, 5)]
    assert all(row.probabilities == [None, 0.1, 0.2, 0.3] for row in rows)
    assert all(row.counted == [False, True, True, True] for row in rows)
    assert silent.read(trainer, SoloCommunicator("here"), 1) == []


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


def rows(*documents: tuple[list[int], list[int]], packing: bool = False) -> Dataset:
    """Rows of documents: (tokens, whether each is learnt)."""
    made = (Document("", np.array(t, np.int32), np.array(c, np.uint8)) for t, c in documents)
    table, _ = build_table(made, 40, splittable=False, packing=packing)
    assert table is not None
    return Dataset(table, 40, packing)


def test_a_rows_prompt_is_what_comes_before_the_first_token_that_is_learnt() -> None:
    chat = rows((list(range(8)), [0, 0, 0, 1, 1, 0, 0, 1]))
    assert split_at_prompt(chat.row(0)) == ([0, 1, 2], [3, 4, 5, 6, 7])
    text = rows((list(range(7)), [1] * 7))
    assert split_at_prompt(text.row(0)) == ([0, 1, 2], [3, 4, 5, 6]), "of a text its first half"
    both = rows(([1, 2, 3, 4], [0, 0, 0, 1]), ([7, 8, 9], [0, 0, 1]), packing=True)
    prompt, rest = split_at_prompt(both.row(0))
    assert (prompt, rest) in (([1, 2, 3], [4]), ([7, 8], [9])), "of one document, not of its neighbours"


def likeliest(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """What follows a prompt, each token by a forward pass through all before it."""
    found = list(prompt)
    for _ in range(count):
        found.append(int(mx.argmax(model(mx.array([found]))[0, -1])))
    return found[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rows_are_continued_by_the_likeliest_tokens_up_to_an_end(family: str) -> None:
    case, valid = Case(family), rows(*(([n + k for k in range(8)], [0] * 4 + [1] * 4) for n in (1, 5, 9)))
    model, _, _ = weights_of(case)
    prompts = {n: [n + k for k in range(4)] for n in (1, 5, 9)}
    expected = {n: likeliest(model, prompt, 37) for n, prompt in prompts.items()}  # rows have 40 positions
    end = expected[5][7]
    comm = SoloCommunicator("here")
    with CommThread() as thread:
        trainer = trainer_of(case, comm, thread)
        found = RowReader(valid, 3, str, [end]).read(trainer, comm, 2)
        only_read = RowReader(valid, 3, str).read(trainer, comm, 2)
    assert len(found) == 3
    for row in found:
        assert row.continued is not None
        (n,) = [n for n, prompt in prompts.items() if row.continued.prompt == str(prompt)]
        cut = expected[n].index(end) if end in expected[n] else 37
        assert row.continued.written == str(expected[n][:cut])
        assert row.continued.held_out == str([n + k for k in range(4, 8)])
    assert [replace(row, continued=None) for row in found] == only_read


def test_what_was_written_is_kept_with_the_row(tmp_path: Path) -> None:
    row = ReadRow(["a", "b"], [None, 0.5], [False, True], Continuation("a", "c", "b"))
    write_readings(tmp_path, 0, [row])
    found = read_readings(tmp_path)
    assert found is not None
    assert found["last"]["texts"][0]["continued"] == {"prompt": "a", "written": "c", "held_out": "b"}
    (tmp_path / "samples.json").write_text((tmp_path / "samples.json").read_text().replace("written", "x"))
    assert read_readings(tmp_path) is None


def test_a_model_is_continued_where_each_machine_has_room_for_it_and_the_caches() -> None:
    spec, recipe = llama_like(8, 1024), recipe_of()
    whole = sum(unit.parameters for unit in spec.units) * 2
    plans = {}
    for room in (20 * whole, 2 * whole):
        nodes = [node_of(f"node-{i}", room) for i in range(4)]
        plans[room] = resolve(recipe, spec, nodes, state_bytes_of(recipe.optimizer))
    assert [holds_whole(plan, spec, 2048) for plan in plans.values()] == [True, False]


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
    assert all(text["continued"]["prompt"] for text in found["last"]["texts"])
    assert not (unread / "samples.json").exists()
    weights = [(run / "final" / "model.safetensors.index.json").parent for run in (alone, unread)]
    files = [sorted(folder.glob("*.safetensors")) for folder in weights]
    assert [one.read_bytes() for one in files[0]] == [one.read_bytes() for one in files[1]]
