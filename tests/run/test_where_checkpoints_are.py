"""Where a run looks for checkpoints, and what is no run without them: unplugged disks, links, a machine's old name."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.king import COMM, recipe

from mlx_empire.comm.failure import AgreedExit
from mlx_empire.errors import DamagedError, UserError
from mlx_empire.recipe.load import dump_recipe
from mlx_empire.run.folder import refuse_unwritable
from mlx_empire.run.resume import find_checkpoint, folder_of


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
