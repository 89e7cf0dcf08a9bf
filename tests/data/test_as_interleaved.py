"""Mixtures beside the package `datasets`' own interleaving. It is optional: skipped without it."""

from __future__ import annotations

import numpy as np
import pytest
from data.test_mixture import sources_of

from mlx_empire.data.order import InFileOrder, Mixed
from mlx_empire.recipe.mixture import DataSource, shares

datasets = pytest.importorskip("datasets", reason="the optional package datasets is not installed")

LENGTHS = [500, 17, 80]
WEIGHTS = [5.0, 1.0, 2.5]
SOURCES = [DataSource.model_validate({"path": f"d{n}", "weight": w}) for n, w in enumerate(WEIGHTS)]


@pytest.fixture(scope="module")
def interleaved() -> np.ndarray:
    """(rows, 2): source and place in it of each row, in their order, until every source was read to its end."""
    sources = [
        datasets.Dataset.from_dict({"source": [n] * rows, "place": list(range(rows))}).to_iterable_dataset()
        for n, rows in enumerate(LENGTHS)
    ]
    chances = (np.array(WEIGHTS) / sum(WEIGHTS)).tolist()
    made = datasets.interleave_datasets(
        sources, probabilities=chances, seed=3, stopping_strategy="all_exhausted"
    )
    return np.array([(row["source"], row["place"]) for row in made])


def ours(seed: int) -> Mixed:
    return Mixed(SOURCES, [InFileOrder(rows) for rows in LENGTHS], LENGTHS, seed, 4, 100_000)


def test_the_same_choices_of_source_read_the_same_rows_in_the_same_order(
    interleaved: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = interleaved[:, 0]
    assert (np.bincount(chosen)[1:] > 2 * np.array(LENGTHS[1:])).all(), (
        "sources are read again from their beginning"
    )
    mixed = ours(0)
    monkeypatch.setattr(mixed, "_drawn", lambda block: np.resize(chosen, 2**14))
    rows = mixed.rows_at(0, len(chosen))
    offsets = np.cumsum([0, *LENGTHS])
    assert rows.tolist() == (offsets[chosen] + interleaved[:, 1]).tolist()


def test_both_draw_sources_as_often_as_their_weights_say(interleaved: np.ndarray) -> None:
    for chosen in (interleaved[:, 0], sources_of(ours(3).rows_at(0, 20_000), LENGTHS)):
        expected = np.array([float(share) for share in shares(SOURCES)])
        spread = np.sqrt(expected * (1 - expected) / len(chosen))
        found = np.bincount(chosen, minlength=len(WEIGHTS)) / len(chosen)
        assert (abs(found - expected) < 3 * spread).all()
