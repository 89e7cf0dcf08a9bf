"""`inspect --loss`: a row's loss is that of mlx-lm's whole model; rows that it knows and strange ones are found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from support.mpi import launch_ranks
from support.rows import FIXTURES, MODEL, chat

from mlx_empire.data.encode import encode_rows, load_tokenizer
from mlx_empire.data.files import RawRow
from mlx_empire.inspect.loss import Losses, loss_document, loss_findings

LENGTH = 96
RECIPE = f"""\
model: {{path: {MODEL}, dtype: float32}}
data: {{path: rows.jsonl, sequence_length: {LENGTH}}}
batch: {{global_size: 4, micro_size: 2}}
optimizer: {{learning_rate: 1.0e-3}}
run: {{dir: run, steps: 3}}
"""
STRANGE = chat('Define the noun "cat".', "qX]zv #~ kWjq{ }Zz|q^^ vvQ%%x")


def losses_of(values: list[float], learnt: int = 10, likeliest: int = 5) -> Losses:
    count = len(values)
    return Losses(
        [f"f:{n}" for n in range(1, count + 1)],
        np.array(values),
        np.full(count, learnt),
        np.full(count, likeliest),
    )


def test_a_row_stands_out_by_what_is_ordinary_for_the_others() -> None:
    ordinary = [3 + 0.1 * math.sin(n) for n in range(40)]
    found = losses_of([*ordinary, 3.9, 9.0])
    (strange,) = loss_findings(found)
    assert (strange.name, strange.count) == ("incoherent", 1)
    assert strange.places[0].where == "f:42", "0.9 more is within one nat"
    assert loss_findings(losses_of([*ordinary[:10], 9.0])) == [], "too few to tell what is ordinary"
    wide = [3 + 3 * math.sin(n) for n in range(40)]
    assert loss_findings(losses_of([*wide, 9.0])) == [], "rows that all differ make none strange"


def test_a_row_is_known_where_each_token_is_the_likeliest() -> None:
    found = losses_of([0.1, 0.2, 2.0])
    found.likeliest[1] = 10
    (known,) = loss_findings(found)
    assert [place.where for place in known.places] == ["f:2"]
    document = loss_document(found)
    assert document["mean"] == pytest.approx(2.3 / 3)
    assert document["likeliest"] == 20 / 30
    assert [place["where"] for place in document["least"]] == ["f:1", "f:2", "f:3"]
    assert document["greatest"][0]["where"] == "f:3"


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Ordinary rows, a strange one in line 8 and a long one; a recipe for them."""
    monkeypatch.chdir(tmp_path)
    lines = (FIXTURES / "wordnet" / "train.jsonl").read_text().splitlines()
    made = [json.loads(line) for line in lines[:30]]
    made.insert(7, STRANGE)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    Path("my.yaml").write_text(RECIPE)
    return made


@pytest.mark.slow
def test_losses_are_those_of_the_whole_model_and_the_strange_row_is_found(
    rows: list[dict[str, Any]], found: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = found("my.yaml", "--loss")
    model, _ = mlx_lm.load(str(MODEL))
    model.set_dtype(mx.float32)
    tokenizer = load_tokenizer(MODEL)
    raw = [RawRow(f"rows.jsonl:{n}", row) for n, row in enumerate(rows, 1)]
    expected, total, count, hits = {}, 0.0, 0, 0
    for one in encode_rows(raw, "chat", tokenizer, True, None):
        tokens, flags = one.tokens[: LENGTH + 1], one.counted[1 : LENGTH + 1].astype(bool)
        logits = model(mx.array(tokens[None, :-1]))[0]
        each = np.array(nn.losses.cross_entropy(logits, mx.array(tokens[1:])))[flags]
        hits += int((np.array(mx.argmax(logits, axis=-1))[flags] == tokens[1:][flags]).sum())
        expected[one.where] = float(each.mean())
        total, count = total + float(each.sum()), count + len(each)
    loss = document["loss"]
    assert loss["rows"] == len(rows)
    assert loss["tokens"] == count == document["parts"][0]["learnt"]
    assert loss["mean"] == pytest.approx(total / count, rel=1e-4)
    assert loss["likeliest"] == hits / count
    order = sorted(expected, key=lambda where: -expected[where])
    assert [place["where"] for place in loss["greatest"]] == order[:5]
    assert [place["where"] for place in loss["least"]] == order[::-1][:5]
    for place in loss["greatest"] + loss["least"]:
        assert f"loss {expected[place['where']]:.2f}," in place["says"]
    strange = next(one for one in document["findings"] if one["name"] == "incoherent")
    assert strange["places"][0]["where"] == "rows.jsonl:8" == order[0]
    assert not Path("run").exists(), "nothing is trained or written"


@pytest.mark.slow
def test_over_two_ranks_the_losses_are_the_same_and_said_once(
    rows: list[dict[str, Any]], found: Callable[..., Any]
) -> None:
    here = Path.cwd()  # the ranks are started elsewhere
    words = [here / "my.yaml", "--loss", f"data.path={here / 'rows.jsonl'}", "memory.zero_stage=3"]
    alone = found(*words)
    launch = launch_ranks(2, "mlx_empire.inspect", [*words, "--json"], timeout=240)
    assert launch.returncode == 0, launch.stderr
    assert json.loads(launch.stdout) == alone


@pytest.mark.slow
def test_what_the_model_would_write_itself_is_known(
    found: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one token and what mlx-lm's model makes of it, always the likeliest; one has another last token."""
    monkeypatch.chdir(tmp_path)
    model, _ = mlx_lm.load(str(MODEL))
    rows = [[first] for first in (1, 80, 200, 300, 400)]
    for row in rows:
        while len(row) < 24:
            row.append(int(mx.argmax(model(mx.array([row]))[0, -1])))
    rows[2][-1] = rows[2][-1] % 500 + 1
    Path("rows.jsonl").write_text("".join(json.dumps({"tokens": row}) + "\n" for row in rows))
    document = found("rows.jsonl", "--model", MODEL, "--loss")
    (known,) = [one for one in document["findings"] if one["name"] == "known"]
    assert [place["where"] for place in known["places"]] == [f"rows.jsonl:{n}" for n in (1, 2, 4, 5)]
    assert document["loss"]["likeliest"] == (5 * 23 - 1) / (5 * 23)
