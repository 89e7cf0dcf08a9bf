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
from support.planning import assess, llama_like, nodes_of, recipe_of

from mlx_empire.checkpoint.find import FoundCheckpoint
from mlx_empire.checkpoint.manifest import (
    Origin,
    Resolved,
    config_digest,
    decode_manifest,
    sampled_digest,
)
from mlx_empire.errors import UserError
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.fill import Recomputation
from mlx_empire.plan.resolve import resolve
from mlx_empire.plan.shares import RunPlan
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
    target = SimpleNamespace(adapters=None, spec=SimpleNamespace(has_frozen=False))
    splits = SimpleNamespace(digest=rows)
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


def planned(limit: float, *overrides: str, noted: Recomputation | None = None, ranks: int = 1) -> RunPlan:
    """The plan of a run of two layers on machines with `limit` times what one needs that recomputes all."""
    words = ("data.sequence_length=512", "batch.micro_size=1", "batch.cells=1", "memory.zero_stage=3")
    everything = recipe_of(*words, "memory.gradient_checkpointing=true")
    (least,) = assess(everything, llama_like(), nodes_of([1 << 40])).plan.ledgers
    asked = recipe_of(*words, "memory.gradient_checkpointing=auto", *overrides)
    states = state_bytes_of(asked.optimizer)
    return resolve(asked, llama_like(), nodes_of([int(limit * least.peak)] * ranks), states, noted)


def stored_one(plan: RunPlan, text: str = TEXT) -> FoundCheckpoint:
    """The checkpoint of a run with that plan, as it is read again."""
    chosen = Recomputation.of(plan.work)
    assert chosen is not None
    resolved = Resolved(cells=2, gradient_dtype="float32", unrecomputed=chosen.unrecomputed, kept=chosen.kept)
    again = decode_manifest(manifest_of(text, resolved=resolved).encode())
    return FoundCheckpoint(Path("c/step-000007"), again, (), ())


def test_a_run_goes_on_with_what_it_recomputed_and_kept_on_other_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small, roomy = planned(1.15), planned(100.0)
    assert Recomputation.of(small.work) != Recomputation.of(roomy.work)
    start = begin(monkeypatch, stored_one(small))
    assert start.noted == Recomputation.of(small.work)
    for ranks in (1, 2):
        taken = planned(100.0, noted=start.noted, ranks=ranks)
        assert Recomputation.of(taken.work) == start.noted
        assert start.recomputes_otherwise(taken) == []
    (told,) = start.recomputes_otherwise(roomy)
    assert told.startswith("numerics.bits: strict: ")
    assert "on a GPU last bits may differ" in told


def test_what_was_noted_binds_nobody_who_asks_for_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    found = stored_one(planned(1.15))
    assert begin(monkeypatch, found, "memory.keep_products=false").noted is None
    assert begin(monkeypatch, found, "memory.gradient_checkpointing=true").noted is None
    fast = begin(monkeypatch, found, "numerics.bits=fast")
    assert fast.notes[-1] == "changed since the checkpoint: numerics.bits: strict -> fast"
    free = planned(100.0, "numerics.bits=fast", noted=fast.noted)
    assert free.work.unrecomputed == planned(100.0).work.unrecomputed
    assert fast.recomputes_otherwise(free) == []
    assert begin(monkeypatch, found_one()).noted is None  # an earlier version noted nothing
    assert begin(monkeypatch, None).noted is None


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
