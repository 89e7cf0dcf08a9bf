"""What a continued run must find as it was: data, frozen weights; and where it looks for checkpoints."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.stepping import Case, optimizer_of, trainer_of, weights_of

from mlx_empire.checkpoint.identity import base_digest, config_digest
from mlx_empire.checkpoint.manifest import Manifest, Resolved, digest_of
from mlx_empire.checkpoint.restore import Restore
from mlx_empire.checkpoint.resume import Start, find_start, folder_of, require_same, require_steps_left
from mlx_empire.checkpoint.shard import live_pieces, write_shard
from mlx_empire.checkpoint.survey import Found
from mlx_empire.comm.failure import AgreedExit
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.store import ShardStore
from mlx_empire.errors import DamagedError, UserError
from mlx_empire.plan.model import UnitSpec
from mlx_empire.plan.shards import make_plan
from mlx_empire.recipe.load import parse_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.folder import refuse_unwritable

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


def start(*overrides: str) -> Start:
    manifest = Manifest(
        format=1,
        step=7,
        written_by={},
        recipe=TEXT,
        recipe_digest=digest_of(TEXT.encode()),
        data_digest="rows",
        next_row=28,
        seed=0,
        base="base",
        resolved=Resolved(cells=2, gradient_dtype="float32"),
        numerics={},
        zero_stage=3,
        shares=(1.0,),
        shards=(),
    )
    return Start(recipe(*overrides), Found(Path("c/step-000007"), manifest, (), ()), (), "rows", "base")


def test_data_and_base_must_be_the_same() -> None:
    require_same(start())
    with pytest.raises(UserError, match=r"data\.path: d holds other rows"):
        require_same(replace(start(), data="others"))
    with pytest.raises(UserError, match=r"model\.path: m holds other weights"):
        require_same(replace(start(), base="another"))
    accepted = start("run.accept_changes=[data.path,model.path]")
    require_same(replace(accepted, data="others", base="another", config="c" * 64))
    require_same(Start(recipe(), None, (), "others", "another"))


def test_a_configuration_that_was_noted_must_be_the_same() -> None:
    before = start()
    assert before.found is not None
    noted = before.found.manifest.model_copy(update={"config": "c" * 64})
    noting = replace(before, found=replace(before.found, manifest=noted), config="c" * 64)
    require_same(noting)
    require_same(replace(before, config="d" * 64))  # an older version noted none
    with pytest.raises(UserError, match=r"model\.path: m holds another config\.json"):
        require_same(replace(noting, config="d" * 64))


def test_a_configuration_is_known_by_what_it_says(tmp_path: Path) -> None:
    before = config_digest(MODEL)
    said = json.loads((MODEL / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(dict(reversed(said.items())), indent=7))
    assert config_digest(tmp_path) == before
    (tmp_path / "config.json").write_text(json.dumps(said | {"rope_theta": 5e5}))
    assert config_digest(tmp_path) not in (before, None)
    assert config_digest(tmp_path / "absent") is None


def test_a_run_that_is_shorter_than_its_checkpoint_is_refused() -> None:
    require_steps_left(start(), 7)
    with pytest.raises(UserError, match=r"run\.steps: 6: .* is of step 7 already"):
        require_steps_left(start(), 6)


def test_a_base_is_known_by_its_bytes(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(MODEL, copy)
    assert base_digest(copy) == base_digest(MODEL)
    weights = copy / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1 - len(raw) // 128] ^= 1  # inside the last sample
    weights.write_bytes(bytes(raw))
    assert base_digest(copy) != base_digest(MODEL)


def test_every_node_may_keep_its_checkpoints_where_it_likes() -> None:
    assert folder_of(recipe(), COMM) == Path("r/checkpoints")
    assert folder_of(recipe("run.checkpoints=/disk/{host}-{rank}"), COMM) == Path("/disk/king.local-0")


def test_a_run_without_checkpoints_begins_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for resume in ("auto", "never"):
        assert find_start(COMM, recipe(f"run.resume={resume}")).step == 0
    with pytest.raises(UserError, match=r"r/checkpoints has no checkpoint of step 3; there are: none"):
        find_start(COMM, recipe("run.resume=3"))
    with pytest.raises(UserError, match=r"run\.resume: a/b: expected auto, never, a step, or the path"):
        find_start(COMM, recipe("run.resume=a/b"))
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_leads_nowhere_is_no_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its disk may be unplugged: a run that began anew would throw away what it has of the old one."""
    monkeypatch.chdir(tmp_path)
    Path("r").mkdir()
    Path("r/checkpoints").symlink_to(tmp_path / "unplugged")
    with pytest.raises(AgreedExit) as ended:
        find_start(COMM, recipe())
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
    assert find_start(COMM, named).found is None, "they may be of another run: this one has not begun"
    Path("r").mkdir()
    Path("r/metrics.jsonl").touch()
    with pytest.raises(
        DamagedError, match=r"COMMIT in .*disk/former-0/step-000007 on king\.local cannot be read"
    ):
        find_start(COMM, named)
    Path("disk/king.local-0/step-000001").mkdir(parents=True)
    Path("disk/king.local-0/step-000001/COMMIT").write_text("cut")
    with pytest.raises(DamagedError, match=r"COMMIT in .*disk/king\.local-0/step-000001"):
        find_start(COMM, named)


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
        found = start().found
        assert found is not None
        found = Found(folder, found.manifest.model_copy(update={"shards": (shard,)}), (0,), ())
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
        found = start().found
        assert found is not None
        manifest = found.manifest.model_copy(update={"shards": (shard.model_copy(update={"pieces": old}),)})
        with pytest.raises(
            UserError, match="has the state v_step, which this version of mlx_empire does not know"
        ):
            Restore(Found(tmp_path, manifest, (0,), ()), trainer.store, comm)
