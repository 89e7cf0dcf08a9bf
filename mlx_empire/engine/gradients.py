"""From gradients of micro-batches to finished sums on their owners.

For each unit and round (cell of this rank):

1. accumulate: a cell's micro-batches add up in fp32, in order (`MicroBatchSum`);
2. round off:  each tensor's sum is rounded once to the wire's dtype, also where it stays local;
3. reduce-scatter, on the communication thread: every owner receives its interval of each rank's contribution and
   adds them in rank order, in fp32, to its total. Rounds follow one another, so the order is that of the cells.

Stage 0 then gathers the finished sums to all ranks; stage 1 keeps contributions whole until the backward has ended
and only then reduces them. When is the schedule's business (`plan.schedule`): one exchange is in flight while the next
unit is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from typing import cast

import mlx.core as mx
import numpy as np

from mlx_empire import progress
from mlx_empire.comm.buffers import DTYPES, host_view
from mlx_empire.comm.protocol import Communicator, Wire
from mlx_empire.comm.thread import CommThread
from mlx_empire.engine.spares import Spares, compile_rounding, rounded_into
from mlx_empire.engine.store import ShardStore
from mlx_empire.plan.shards import Segment
from mlx_empire.plan.workload import CellLayout


class MicroBatchSum:
    """The running fp32 sum of one unit's gradients over the micro-batches of one cell."""

    def __init__(self) -> None:
        self.arrays: list[mx.array] = []

    def add(self, gradients: Sequence[mx.array]) -> None:
        """Add one micro-batch's gradients (lazily). A cell of one micro-batch keeps them as they are."""
        if not self.arrays:
            self.arrays = list(gradients)
        else:
            self.arrays = [
                a.astype(mx.float32) + g.astype(mx.float32)
                for a, g in zip(self.arrays, gradients, strict=True)
            ]


class RowSum:
    """The running fp32 sum of a table's gradient over the micro-batches of one cell: of the rows that were looked up.

    A vocabulary's other rows have no gradient, so the sum is as large as the tokens, and not as the table. `rows`
    (n,) ascend; `values` (n, width) float32.
    """

    def __init__(self) -> None:
        self.rows: np.ndarray = np.empty(0, np.int64)
        self.values: np.ndarray = np.empty((0, 0), np.float32)

    def add(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Add one micro-batch's: distinct ascending `rows` and their `values`."""
        both = np.union1d(self.rows, rows)
        total = np.zeros((both.size, values.shape[1]), np.float32)
        total[np.searchsorted(both, self.rows)] = self.values.reshape(-1, values.shape[1])
        with np.errstate(invalid="ignore"):  # of infinities: whoever looks at the gradient's norm finds them
            total[np.searchsorted(both, rows)] += values
        self.rows, self.values = both, total

    def whole(self, rows: int, dtype: mx.Dtype) -> mx.array:
        """The table's gradient (rows, width) in `dtype`, each element rounded to it once; evaluated."""
        table = mx.zeros((rows, self.values.shape[1]), dtype)
        rounded = mx.array(self.values).astype(dtype)
        mx.eval(table, rounded)
        host_view(table).reshape(table.shape)[self.rows] = host_view(rounded).reshape(self.values.shape)
        return table

    def added_to(self, table: mx.array) -> mx.array:
        """`table` (rows, width) in fp32, with this added; evaluated. The memory may be that of `table`."""
        table = mx.contiguous(table).astype(mx.float32)  # in this order: what is copied is still narrow
        host_view(table).reshape(table.shape)[self.rows] += self.values
        return table


class EmbeddingSum:
    """A cell's sum of the embedding's gradients over its micro-batches: the table's rows, other tensors whole.

    Both are there after `settle`: until then the CPU's stream computes, and one thread waits for rows and adds them, in
    the order in which they were handed over.
    """

    def __init__(self) -> None:
        self.rows, self.dense = RowSum(), MicroBatchSum()
        self._adding: list[Future[None]] = []

    def add_rows(self, adder: Executor, rows: np.ndarray, values: mx.array) -> None:
        """Have `adder`, which has one thread, add one micro-batch's rows; `values` are handed over."""
        self._adding.append(
            adder.submit(lambda: self.rows.add(rows, np.array(values, copy=False)))  # which waits for them
        )

    def settle(self) -> None:
        """Wait for all that was handed over."""
        for added in self._adding:
            added.result()
        self._adding = []
        mx.eval(self.dense.arrays)


class GradientStore:
    """The gradient totals of this rank: by unit and segment a (rows, 64) array over the rank's state interval."""

    def __init__(
        self,
        store: ShardStore,
        comm: Communicator,
        thread: CommThread,
        layout: CellLayout,
        dtype: str,
    ) -> None:
        self._store, self._comm, self._thread, self._layout = store, comm, thread, layout
        self._dtype = dtype
        if dtype != "float32":
            compile_rounding()
        self._plan = store.plan
        self.totals: dict[int, list[mx.array]] = {}
        self._spares = Spares(0)
        self._in_flight: list[Future[None]] = []
        self.suspects: set[str] | None = (
            None  # if there: the tensors of which this rank's sums are not finite
        )

    def reuse(self, most: int) -> None:
        """Keep totals' buffers for the next unit or step, up to so many bytes with those in use (`Ledger.spare`)."""
        self._spares = Spares(most)

    @property
    def last_round(self) -> int:
        """The round after which totals are complete."""
        return self._layout.rounds - 1

    def inspect(self, index: int, cell: MicroBatchSum) -> None:
        """A cell's sum of unit `index` is complete: note what is not finite, where that is asked for."""
        if self.suspects is not None:
            self._suspect(self.suspects, index, cell)

    def round_off(self, index: int, cell: MicroBatchSum) -> None:
        """Round a complete sum to the wire's dtype, in place: its arrays are then evaluated and flat.

        vjp gives transposed gradients, so flat ones are copies: of a layer all at once, when what it was differentiated
        with is gone. Of the root as many at once as are no larger than the largest one.
        """
        for i, wire in enumerate(self._wires(index)):
            cell.arrays[i] = cell.arrays[i].astype(wire).flatten()
        if index == 0:
            largest = max((array.nbytes for array in cell.arrays), default=0)
            self._store.evaluate.in_groups(cell.arrays, lambda array: array.nbytes, largest)
        else:
            self._store.evaluate(cell.arrays)

    def _wires(self, index: int) -> list[mx.Dtype]:
        """The wire's dtype of each trainable tensor of a unit."""
        segments = self._plan.units[index].segments
        return [DTYPES[segments[s].dtype] for s, _ in self._store.trainable(index)]

    def reduce(self, index: int, round_index: int, cell: MicroBatchSum | None) -> None:
        """Begin to reduce unit `index`'s sum of this rank's cell in this round; None where the rank has no cell."""
        mark, fresh = None, round_index == 0
        if fresh:
            spans = [self._plan.state_interval(s, self._comm.rank) for s in self._trained(index)]
            wanted = [(b - a, "float32") for a, b in spans]
            self.totals[index], mark = self._spares.take(wanted, self._store.evaluate)
        totals, pieces = self.totals[index], self._pieces(index, cell)
        flags = self._layout.contributes(round_index)
        name = "reduce", index
        job = self._thread.submit(self._reduce_scatter, index, pieces, totals, flags, fresh, mark, name=name)
        self._in_flight.append(job)

    def _reduce_scatter(
        self,
        index: int,
        arrays: list[list[tuple[int, mx.array]]],
        totals: list[mx.array],
        flags: list[bool],
        fresh: bool,
        mark: mx.array | None,
    ) -> None:
        """On the communication thread: each segment's contributions to their owners' totals. These are `fresh` in the
        first round: nobody has filled them with zeros, and what they held is read until `mark` is there."""
        progress.reach("reduce")
        if mark is not None:
            host_view(mark)
        for segment, placed, total in zip(self._trained(index), arrays, totals, strict=True):
            a, b = segment.interval(self._comm.rank)
            own = host_view(total)[a:b] if self._plan.zero_stage == 0 else host_view(total)
            pieces = [(start, host_view(array)) for start, array in placed]
            wire = cast(Wire, segment.dtype)
            self._comm.reduce_scatter(pieces, segment.edges, own, flags, wire, fresh=fresh)

    def replicate(self, index: int) -> None:
        """Begin to give unit `index`'s complete totals to every rank (stage 0)."""
        job = self._thread.submit(self._all_gather, index, self.totals[index], name=("replicate", index))
        self._in_flight.append(job)

    def _all_gather(self, index: int, totals: list[mx.array]) -> None:
        for segment, total in zip(self._trained(index), totals, strict=True):
            self._comm.all_gather(host_view(total), segment.edges)

    def settle(self, index: int, *, last: bool) -> None:
        """Wait for what is in flight, which is unit `index`'s; after the last round its totals get their dtype."""
        for future in self._in_flight:
            self._thread.wait(future, "reduce")
        self._in_flight = []
        if last and self._dtype != "float32":
            wide = self.totals[index]
            buffers, _ = self._spares.take([(t.size, self._dtype) for t in wide], lambda made: None)
            self.totals[index] = rounded_into(buffers, wide)
            self._store.evaluate(self.totals[index])
            self._spares.give(wide, self._store.evaluate.mark())

    def drop(self, index: int) -> None:
        """Unit `index`'s totals are not needed any more: all that reads them is handed over."""
        self._spares.give(self.totals.pop(index), self._store.evaluate.mark())

    def clear(self) -> None:
        """Drop all totals (after the update)."""
        for index in list(self.totals):
            self.drop(index)

    def drop_spares(self) -> None:
        """Something that is no step needs the memory."""
        self._spares.drop()

    def _trained(self, index: int) -> list[Segment]:
        return [s for s in self._plan.units[index].segments if s.kind != "frozen"]

    def _suspect(self, suspects: set[str], index: int, cell: MicroBatchSum) -> None:
        for (_, placement), array in zip(self._store.trainable(index), cell.arrays, strict=True):
            if not mx.isfinite(array).all().item():
                suspects.add(placement.tensor.name)

    def _pieces(self, index: int, cell: MicroBatchSum | None) -> list[list[tuple[int, mx.array]]]:
        """The contribution by segment: tensors at their places, without copying them into one buffer."""
        parts: list[list[tuple[int, mx.array]]] = [[] for _ in self._trained(index)]
        if cell is not None:
            self.round_off(index, cell)
            for (s, placement), array in zip(self._store.trainable(index), cell.arrays, strict=True):
                parts[s].append((placement.start, array))
            cell.arrays = []
        return parts
