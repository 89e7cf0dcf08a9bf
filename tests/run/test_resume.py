"""What a continued run, or a daughter, must find as it was."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.king import COMM, TEXT, recipe
from support.manifests import manifest_of

from mlx_empire.checkpoint.find import FoundCheckpoint
from mlx_empire.checkpoint.manifest import (
    Origin,
    config_digest,
    sampled_digest,
)
from mlx_empire.errors import UserError
from mlx_empire.recipe.load import dump_recipe
from mlx_empire.run import resume
from mlx_empire.run.resume import (
    Start,
    require_same,
    require_steps_left,
    where_to_begin,
)

MODEL = Path(__file__).resolve().parents[1] / "fixtures" / "tiny-llama-260k"


def found_one(text: str = TEXT) -> FoundCheckpoint:
    """A checkpoint of a run that resolved `batch.cells` and `memory.gradient_dtype` itself."""
    manifest = manifest_of(text)
    return FoundCheckpoint(Path("c/step-000007"), manifest, (), ())


def origin(*overrides: str, **fields: str | None) -> Origin:
    return replace(Origin(dump_recipe(recipe(*overrides)), "rows", "base", "config"), **fields)


def begin(
    monkeypatch: pytest.MonkeyPatch, found: FoundCheckpoint | None, *overrides: str, rows: str = "rows"
) -> Start:
    """Where a run of 10 steps that trains all weights on `rows` begins, if `found` is what it finds."""
    monkeypatch.setattr(resume, "find_checkpoint", lambda comm, recipe: (found, ["said"]))
    target, splits = SimpleNamespace(adapters=None), SimpleNamespace(digest=rows)
    return where_to_begin(COMM, recipe(*overrides), target, splits, 10)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"data": "others"},
            r"data\.path: d holds other rows .* add run\.accept_changes=\[data\.path\], or begin",
        ),
        ({"base": "another"}, r"model\.path: m holds other weights .* begin anew with run\.resume=never"),
        ({"base": None}, r"model\.path: m holds other weights"),
        (
            {"config": "another"},
            r"model\.path: m holds another config\.json .* run\.accept_changes=\[model\.path\]",
        ),
    ],
)
def test_rows_weights_and_configuration_must_be_the_same_or_accepted(
    changed: dict[str, str | None], said: str
) -> None:
    before = origin()
    assert require_same(before, before, "c") == []
    with pytest.raises(UserError, match="^c: " + said):
        require_same(before, origin(**changed), "c")
    accepting = origin("run.accept_changes=[data.path,model.path]", **changed)
    assert require_same(before, accepting, "c") == ["run.accept_changes: [] -> [data.path, model.path]"]


def test_where_things_lie_does_not_matter() -> None:
    moved = origin("model.path=/x/m", "data.path=/x/d", "run.dir=/x/r")
    assert require_same(origin(), moved, "c") == [
        "model.path: m -> /x/m", "data.path: d -> /x/d", "run.dir: r -> /x/r"
    ]  # fmt: skip


@pytest.mark.parametrize("none", [None, ""])
def test_where_no_configuration_was_noted_any_will_do_at_the_same_path(none: str | None) -> None:
    """An earlier version noted none, so that another path may be another model."""
    before = origin(config=none)
    require_same(before, origin(), "c")
    with pytest.raises(UserError, match=r"c was made by another recipe: model\.path: m -> /x/m"):
        require_same(before, origin("model.path=/x/m"), "c")


def test_another_recipe_is_refused_with_what_differs() -> None:
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: 0\.001 -> 0\.5; put the old values"):
        require_same(origin(), origin("optimizer.learning_rate=0.5"), "c")


def test_a_run_goes_on_with_what_it_resolved_before(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = begin(monkeypatch, found_one(), "run.eval_every=5")
    assert begun.step == 7
    assert begun.recipe.batch.cells == 2
    assert begun.recipe.memory.gradient_dtype == "float32"
    assert begun.origin == Origin(dump_recipe(begun.recipe), "rows", None, config_digest(Path("m")))
    assert begun.notes == ("said", "changed since the checkpoint: run.eval_every: None -> 5")


LONG = "data.sequence_length=2048"


def test_a_run_older_than_attention_by_pattern_goes_on_by_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint's recipe does not name the key; what it began with is stored again."""
    old = found_one(TEXT.replace("sequence_length: 8", "sequence_length: 2048"))
    begun = begin(monkeypatch, old, LONG)
    assert begun.recipe.numerics.attention == "mask"
    assert "attention: mask" in begun.origin.recipe
    assert begun.notes == ("said",)
    with pytest.raises(UserError, match=r"numerics\.attention: mask -> pattern; .*numerics\.attention\]"):
        begin(monkeypatch, old, LONG, "numerics.attention=pattern")
    accepted = "run.accept_changes=[numerics.attention]"
    begun = begin(monkeypatch, old, LONG, "numerics.attention=pattern", accepted)
    assert begun.recipe.numerics.attention == "pattern"


def test_a_run_stores_how_it_attends_and_goes_on_so(monkeypatch: pytest.MonkeyPatch) -> None:
    new = begin(monkeypatch, None, LONG)
    assert new.recipe.numerics.attention == "pattern"
    stored = found_one(new.origin.recipe)
    assert begin(monkeypatch, stored, LONG).recipe.numerics.attention == "pattern"
    with pytest.raises(UserError, match=r"numerics\.attention: pattern -> mask"):
        begin(monkeypatch, stored, LONG, "numerics.attention=mask")


def test_how_short_rows_attend_does_not_matter() -> None:
    assert require_same(origin("numerics.attention=mask"), origin(), "c")
    with pytest.raises(UserError, match=r"numerics\.attention: mask -> pattern"):
        require_same(origin("numerics.attention=mask", LONG), origin(LONG), "c")


@pytest.mark.parametrize(
    ("overrides", "rows", "said"),
    [
        ([], "others", r"checkpoint c/step-000007: data\.path: d holds other rows"),
        (["batch.cells=4"], "rows", r"batch\.cells: 2 -> 4"),
    ],
)
def test_a_run_that_may_not_go_on_ends_alike_on_all_ranks(
    overrides: list[str], rows: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=said) as refused:
        begin(monkeypatch, found_one(), *overrides, rows=rows)
    assert refused.value.shared


def test_a_configuration_is_known_by_what_it_says(tmp_path: Path) -> None:
    before = config_digest(MODEL)
    said = json.loads((MODEL / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(dict(reversed(said.items())), indent=7))
    assert config_digest(tmp_path) == before
    (tmp_path / "config.json").write_text(json.dumps(said | {"rope_theta": 5e5}))
    assert config_digest(tmp_path) not in (before, None)
    assert config_digest(tmp_path / "absent") is None


def test_a_run_that_is_shorter_than_its_checkpoint_is_refused() -> None:
    require_steps_left(7, 7, "c")
    with pytest.raises(
        UserError, match=r"run\.steps: 6: c is of step 7 already; choose run\.steps of at least 7"
    ):
        require_steps_left(7, 6, "c")


def test_a_base_is_known_by_its_bytes(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(MODEL, copy)
    assert sampled_digest(copy) == sampled_digest(MODEL)
    weights = copy / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1 - len(raw) // 128] ^= 1  # inside the last sample
    weights.write_bytes(bytes(raw))
    assert sampled_digest(copy) != sampled_digest(MODEL)
