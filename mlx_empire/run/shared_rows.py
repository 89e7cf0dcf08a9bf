"""The rows that all ranks train on: read where they are, compared by digest, or sent by rank 0.

Where a run may go on from a checkpoint every byte is read, to be compared; a fresh one believes what is noted of large
files (`data.digests`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.data.rows import Dataset, Rows, Table, join_rows
from mlx_empire.data.splits import Splits, join_splits, load_splits
from mlx_empire.errors import UserError, on_all_ranks
from mlx_empire.model.spec import ModelSpec
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.metrics import FILE_NAME


def share_data(comm: Communicator, recipe: Recipe, spec: ModelSpec) -> Splits:
    """Training and validation rows, the same on every rank. What a run goes on with is read whole, to be compared."""
    data, folder = recipe.data, recipe.model.path
    thorough = any(comm.gather_json(_may_go_on(recipe)))
    tokenizer = data.format == "tokens" or folder.is_dir()
    available = all(path.exists() for path in data.paths) and tokenizer
    return shared_splits(comm, lambda: load_data(recipe, spec, thorough=thorough), available)


def _may_go_on(recipe: Recipe) -> bool:
    """Whether this rank may have a checkpoint to go on from. A place of their own is not looked at."""
    run = recipe.run
    begun = run.checkpoints is not None or any((run.dir / n).exists() for n in (FILE_NAME, "checkpoints"))
    return begun if run.resume == "auto" else run.resume != "never"


def load_data(recipe: Recipe, spec: ModelSpec, *, thorough: bool = True) -> Splits:
    """Training and validation rows, as this machine has them; `thorough` as in `load_splits`."""
    data = recipe.data
    each = {
        path: load_splits(
            path=path,
            format=data.format,
            sequence_length=data.sequence_length,
            packing=data.packing,
            mask_prompt=data.mask_prompt,
            validation_split=data.validation_split or 0.0,
            tokenizer_folder=recipe.model.path,
            vocab_size=int(spec.text_config["vocab_size"]),
            thorough=thorough,
        )
        for path in data.paths
    }
    return join_splits(each)


def shared_splits(comm: Communicator, load: Callable[[], Splits], available: bool) -> Splits:
    """The splits on every rank; `available`: whether this node has data and tokenizer. Collective."""
    everywhere = all(comm.gather_json(available))
    splits: Splits | None = None
    with together(comm):
        if everywhere or comm.rank == 0:
            splits = load()
    if not everywhere:
        return _sent(comm, splits)
    assert splits is not None
    digests = comm.gather_json(splits.digest)
    if len(set(digests)) > 1:
        odd = [comm.hostnames[r] for r, digest in enumerate(digests) if digest != digests[0]]
        raise on_all_ranks(
            UserError(
                f"data.path: {', '.join(odd)} and {comm.hostnames[0]} have different data; copy it anew"
            )
        )
    return splits


def _sent(comm: Communicator, splits: Splits | None) -> Splits:
    """Rank 0's splits on every rank."""
    about = comm.broadcast_json(
        None
        if splits is None
        else {
            "length": splits.train.sequence_length,
            "packed": splits.train.packed,
            "parts": [0 if rows is None else len(rows.parts) for rows in (splits.train, splits.valid)],
            "report": [*splits.report, "data read by rank 0 and sent to the other ranks"],
            "digest": splits.digest,
        }
    )

    def sent(own: Rows | None, parts: int) -> Rows:
        each = [None] * parts if own is None else own.parts
        return join_rows([_dataset(comm, one, about["length"], about["packed"]) for one in each])

    trained, held_out = about["parts"]
    train = sent(splits.train if splits else None, trained)
    valid = sent(splits.valid if splits else None, held_out) if held_out else None
    return Splits(train, valid, about["report"], about["digest"])


def _dataset(comm: Communicator, own: Dataset | None, length: int, packed: bool) -> Dataset:
    kinds = {"tokens": np.int32, "counted": np.uint8, "pieces": np.int64, "rows": np.int64}
    arrays = {}
    for name, dtype in kinds.items():
        values = np.array(getattr(own.table, name)) if own is not None else np.empty(0, dtype)
        arrays[name] = comm.gather_arrays(values)[0]
    return Dataset(Table(**arrays), length, packed)
