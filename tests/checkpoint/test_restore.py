"""Reading a checkpoint: no more is held for others than one unit, and states of another version are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.manifests import manifest_of
from support.stepping import Case, optimizer_of, trainer_of, weights_of

from mlx_empire.checkpoint.find import FoundCheckpoint
from mlx_empire.checkpoint.manifest import Shard
from mlx_empire.checkpoint.restore import Restore
from mlx_empire.checkpoint.shard import live_pieces, write_shard
from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.store import ShardStore
from mlx_empire.errors import UserError
from mlx_empire.model.spec import UnitSpec
from mlx_empire.plan.shards import make_plan


def found_in(folder: Path, shard: Shard) -> FoundCheckpoint:
    """The checkpoint of step 7 in `folder`, whose only shard is `shard`."""
    manifest = manifest_of(shards=(shard,))
    return FoundCheckpoint(folder, manifest, (0,), ())


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
        found = found_in(folder, shard)
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
        found = found_in(tmp_path, shard.model_copy(update={"pieces": old}))
        with pytest.raises(
            UserError, match="has the state v_step, which this version of mlx_empire does not know"
        ):
            Restore(found, trainer.store, comm)
