"""What rank 0 reads for all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.rows import MODEL

from mlx_empire.comm.solo import SoloCommunicator
from mlx_empire.recipe.load import parse_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.agree import share_recipe
from mlx_empire.run.shared_rows import _may_go_on

TEXT = f"""\
model: {{path: {MODEL}}}
data: {{path: rows, sequence_length: 16}}
batch: {{global_size: 4}}
optimizer: {{learning_rate: 1.0e-3}}
run: {{dir: run, steps: 3}}
"""


class Told(SoloCommunicator):
    """A rank that is told what rank 0 said."""

    def __init__(self, rank: int, said: list[Any]) -> None:
        super().__init__("here")
        self.rank, self.said = rank, said

    def broadcast_json(self, value: Any) -> Any:
        if self.rank == 0:
            self.said.append(value)
        return self.said[-1]

    def gather_json(self, value: Any) -> list[Any]:
        return [value]


def test_only_rank_0_reads_the_recipe_whatever_it_is_read_from() -> None:
    said: list[Any] = []
    asked: list[Path] = []

    def read(path: Path, overrides: Sequence[str]) -> Recipe:
        asked.append(path)
        return parse_recipe(TEXT, "here", overrides)

    first, other = (share_recipe(Told(rank, said), Path("rows"), ["run.steps=5"], read) for rank in (0, 1))
    assert asked == [Path("rows")]
    assert first == other
    assert first == parse_recipe(TEXT, "there", ["run.steps=5"])


def test_data_are_compared_byte_for_byte_where_there_may_be_a_checkpoint(tmp_path: Path) -> None:
    def recipe(*more: str) -> Recipe:
        return parse_recipe(TEXT, "recipe.yaml", [f"run.dir={tmp_path}", *more])

    assert [_may_go_on(recipe(*more)) for more in ((), ("run.resume=never",), ("run.resume=3",))] == [
        False,
        False,
        True,
    ]
    assert _may_go_on(recipe(f"run.checkpoints={tmp_path}/elsewhere"))
    (tmp_path / "checkpoints").mkdir()
    assert _may_go_on(recipe())
    assert not _may_go_on(recipe("run.resume=never"))
