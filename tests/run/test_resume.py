"""What a continued run, or a daughter, must find as it was; and where a run looks for checkpoints."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.stepping import Case, optimizer_of, trainer_of, weights_of

from mlx_empire.checkpoint.find import FoundCheckpoint
from mlx_empire.checkpoint.manifest import (
    Manifest,
    Origin,
    Resolved,
    config_digest,
    digest_of,
    sampled_digest,
)
from mlx_empire.checkpoint.restore import Restore
from mlx_empire.checkpoint.shard import live_pieces, write_shard
from mlx_empire.comm.failure import AgreedExit
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.store import ShardStore
from mlx_empire.errors import DamagedError, UserError
from mlx_empire.model.spec import UnitSpec
from mlx_empire.plan.shards import make_plan
from mlx_empire.recipe.load import dump_recipe, parse_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run import resume
from mlx_empire.run.folder import refuse_unwritable
from mlx_empire.run.resume import (
    Start,
    find_checkpoint,
    folder_of,
    require_same,
    require_steps_left,
    where_to_begin,
)

MODEL = Path(__file__).resolve().parents[1] / "fixtures" / "tiny-llama-260k"
TEXT = """\
model: {path: m}
data: {path: d, sequence_length: 8}
batch: {global_size: 4}
optimizer: {learning_rate: 1e-3}
run: {dir: r, steps: 10}
"""
COMM = SoloCommunicator("king.local")


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(TEXT, "x.yaml", overrides)


def found_one(text: str = TEXT) -> FoundCheckpoint:
    """A checkpoint of a run that resolved `batch.cells` and `memory.gradient_dtype` itself."""
    manifest = Manifest(
        format=1,
        step=7,
        written_by={},
        recipe=text,
        recipe_digest=digest_of(text.encode()),
        data_digest="rows",
        next_row=28,
        seed=0,
        base=None,
        resolved=Resolved(cells=2, gradient_dtype="float32"),
        numerics={},
        zero_stage=3,
        shares=(1.0,),
        shards=(),
    )
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


def test_every_node_may_keep_its_checkpoints_where_it_likes() -> None:
    assert folder_of(recipe(), COMM) == Path("r/checkpoints")
    assert folder_of(recipe("run.checkpoints=/disk/{host}-{rank}"), COMM) == Path("/disk/king.local-0")


def test_a_run_without_checkpoints_begins_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for asked in ("auto", "never"):
        assert find_checkpoint(COMM, recipe(f"run.resume={asked}")) == (None, [])
    with pytest.raises(UserError, match=r"r/checkpoints has no checkpoint of step 3; there are: none"):
        find_checkpoint(COMM, recipe("run.resume=3"))
    with pytest.raises(UserError, match=r"run\.resume: a/b: expected auto, never, a step, or the path"):
        find_checkpoint(COMM, recipe("run.resume=a/b"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("saved_before", "made", "there", "refused"),
    [
        (True, '{"step": 1, "loss": 1.0}\n', False, True),
        (True, '{"step": 1, "loss": 1.0}\n', True, False),
        (True, '{"step": 0, "eval_loss": 1.0}\n', False, False),
        (False, '{"step": 1, "loss": 1.0}\n', False, False),
    ],
)
def test_a_checkpoint_disk_that_is_not_mounted_is_no_run_without_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved_before: bool, made: str, there: bool, refused: bool
) -> None:
    """A run makes its folder before its first step; one that began anew would throw away its records."""
    monkeypatch.chdir(tmp_path)
    asked = recipe("run.checkpoints=disk/run", *(["run.save_every=2"] if saved_before else []))
    Path("r").mkdir()
    Path("r/recipe.yaml").write_text(dump_recipe(asked) + "\n")
    Path("r/metrics.jsonl").write_text(made)
    if there:
        Path("disk/run").mkdir(parents=True)
    if refused:
        with pytest.raises(AgreedExit):
            find_checkpoint(COMM, asked)
    else:
        assert find_checkpoint(COMM, asked) == (None, [])
    never = recipe("run.checkpoints=disk/run", "run.resume=never")
    assert find_checkpoint(COMM, never) == (None, [])


def test_a_link_that_leads_nowhere_is_no_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its disk may be unplugged: a run that began anew would throw away what it has of the old one."""
    monkeypatch.chdir(tmp_path)
    Path("r").mkdir()
    Path("r/checkpoints").symlink_to(tmp_path / "unplugged")
    with pytest.raises(AgreedExit) as ended:
        find_checkpoint(COMM, recipe())
    assert ended.value.code == 64
    assert "run.checkpoints: r/checkpoints: r/checkpoints is a link to " in capsys.readouterr().err
    Path("linked").symlink_to(tmp_path / "unplugged")
    with pytest.raises(
        UserError, match=r"run\.dir: linked/r: linked is a link to .*unplugged, which is not there"
    ):
        refuse_unwritable(Path("linked/r"))


def test_checkpoints_under_the_machine_s_former_name_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    former = Path("disk/former-0/step-000007")
    former.mkdir(parents=True)
    (former / "COMMIT").write_text("cut")
    named = recipe("run.checkpoints=disk/{host}-{rank}")
    assert find_checkpoint(COMM, named)[0] is None, "they may be of another run: this one has not begun"
    Path("r").mkdir()
    Path("r/metrics.jsonl").touch()
    with pytest.raises(
        DamagedError, match=r"COMMIT in .*disk/former-0/step-000007 on king\.local cannot be read"
    ):
        find_checkpoint(COMM, named)
    Path("disk/king.local-0/step-000001").mkdir(parents=True)
    Path("disk/king.local-0/step-000001/COMMIT").write_text("cut")
    with pytest.raises(DamagedError, match=r"COMMIT in .*disk/king\.local-0/step-000001"):
        find_checkpoint(COMM, named)


class _Listener(SoloCommunicator):
    """Rank 0 of three that counts what it would send."""

    def __init__(self) -> None:
        super().__init__("here")
        self.size, self.hostnames = 3, ["a", "b", "c"]
        self.sent: list[int] = []

    def transfer(self, sends, receives) -> None:  # type: ignore[no-untyped-def]
        assert not receives
        self.sent.append(sum({id(buffer): buffer.nbytes for _, buffer in sends}.values()))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_reader_holds_no_more_than_one_unit_for_others(tmp_path: Path, stage: int) -> None:
    """One rank has the only shard and gives two others what they keep, unit by unit."""
    comm = _Listener()
    with CommThread() as thread:
        trainer = trainer_of(Case(state_bits=8, dtype="bfloat16"), SoloCommunicator("here"), thread)
        folder = tmp_path / "step-000007"
        folder.mkdir()
        pieces = live_pieces(trainer.store, 0)
        by_unit: dict[int, int] = {}
        for piece in pieces:
            by_unit[piece.unit] = by_unit.get(piece.unit, 0) + piece.nbytes
        shard = write_shard(folder / "shard-00000-of-00001.safetensors", pieces, 0, "here", lambda u, n: None)
        manifest = found_one().manifest.model_copy(update={"shards": (shard,)})
        found = FoundCheckpoint(folder, manifest, (0,), ())
        units = [
            UnitSpec(u.name, tuple(p.tensor for s in u.segments for p in s.placements))
            for u in trainer.store.plan.units
        ]
        model, _, _ = weights_of(Case(state_bits=8, dtype="bfloat16"))
        store = ShardStore(make_plan(units, [2, 1, 1], stage), model, comm, thread)
        Restore(found, store, comm).run(optimizer_of(Case(state_bits=8)), 1e-3)
    assert len(comm.sent) == len(units)
    assert all(0 < sent <= by_unit[unit] for unit, sent in enumerate(comm.sent))
    if stage == 3:
        assert sum(comm.sent) < 0.55 * shard.nbytes  # the half that is not its own


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    with CommThread() as thread:
        case, comm = Case(state_bits=8, dtype="bfloat16"), SoloCommunicator("here")
        trainer = trainer_of(case, comm, thread)
        path = tmp_path / "shard-00000-of-00001.safetensors"
        pieces = live_pieces(trainer.store, 0)
        shard = write_shard(path, pieces, 0, "here", lambda u, n: None)
        old = tuple(
            piece.model_copy(update={"array": piece.array.replace("levels", "step")})
            for piece in shard.pieces
        )
        manifest = found_one().manifest.model_copy(
            update={"shards": (shard.model_copy(update={"pieces": old}),)}
        )
        with pytest.raises(
            UserError, match="has the state v_step, which this version of mlx_empire does not know"
        ):
            Restore(FoundCheckpoint(tmp_path, manifest, (0,), ()), trainer.store, comm)
