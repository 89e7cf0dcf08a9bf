"""The order of a training step, told once: a step is a list of actions, and what is not in the list does not happen.

`training_step` and `evaluation` give the list for one rank. Readers play it: the engine on arrays, the ledger on
bytes, the traffic count on wires, the clock on seconds. What kinds of actions there are: `actions`.

The order is layer-major: every micro-batch of a rank passes a layer before the next layer is touched. So each unit is
gathered twice a step however many micro-batches there are, a unit's gradient is complete after one visit, and only one
or two units are ever whole. The phases, and what overlaps:

1. capture   the root is bound; the input of layer 1 of every micro-batch
2. forward   layer by layer, while the next layer is gathered; only the layers' inputs are kept
3. head      loss, and the gradients of head and un-recomputed layers, which run here, once, as one graph
4. backward  layer by layer, last to first: the vjp recomputes the layer; its sums are reduced during the next layer
5. embed     the embedding's gradient, a micro-batch's beside the lowest layer's backward of the next; then the root's
             sums are reduced
6. update    global norm, then unit by unit; where weights stay whole a unit is renewed during the next one's update

Every rank's list has the same collectives in the same order, whatever its micro-batches: `gather`, `reduce`,
`replicate`, `renew` use the wires, `norm` the control plane. They run one after the other, beside the computation;
`bind`, `settle` and `adopt` wait for them (and `free` for a renewal of its unit). One reduction is in flight at a time.

Where weights stay whole, nothing has to be gathered for a second visit, so micro-batches may pass in *waves*
(`StepShape.wave`): phases 1 to 5 for some of a cell's micro-batches after the other. Only a wave's inputs are kept, and
every unit's sum, until the cell's last wave delivers it. Cells follow one another, so the order of additions stays.

Where inputs of recomputed layers go to a file (`StepShape.offload`), one is written while its micro-batch passes the
layer, and its memory goes before the next one passes; in the backward the next one is read while one is differentiated.
So a rank keeps one hidden state for each micro-batch, whatever the number of layers, and in the backward two inputs.

Where a rank runs ahead (`StepShape.run_ahead`), what most actions evaluate is handed to the device, and the main
thread goes on to the next layer. It waits in head and score, for the root's sums and for the norm: there memory is at
its peak, or a number is asked for. Before the first head and the root's sums it waits for all that it handed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from typing import Literal, NamedTuple

from mlx_empire.plan.actions import ALL_UNITS, NOTHING, Action, StepShape

Fold = Literal["nothing", "micro-batches", "rounds", "peak"]


def training_step(shape: StepShape, *, update: bool = True, fold: Fold = "nothing") -> Iterator[Action]:
    """A step of one rank; without `update` its gradients alone, complete at the end.

    `fold`: of a row of alike micro-batches only the first, the second with how often it comes, and the last; `rounds`:
    of alike rounds as well, where they pass together. For readers that count: the peak of memory lies at the first, the
    second or the last. `peak`: of waves these alone, each once, for what they hold does not grow with their number.
    """
    yield from gradients(shape, update=update, fold=fold)
    if update:
        yield from global_norm(shape)
        yield from updates(shape)


def gradients(shape: StepShape, *, update: bool = False, fold: Fold = "nothing") -> Iterator[Action]:
    """Forward and backward, until all totals are complete; with `update` and `in_backward` units are updated too."""
    step = _Step(shape, update, fold)
    for wave in _waves(shape, fold):
        yield from step.forward(shape.boundary, wave)
        yield from step.head(wave)
        yield from step.backward(wave)
        yield from step.embed(wave)
    yield from step.finish()


def global_norm(shape: StepShape) -> Iterator[Action]:
    """Between gradients and updates, where it is not found unit by unit in the backward."""
    if not shape.in_backward:
        yield Action("norm", ALL_UNITS)


def updates(shape: StepShape) -> Iterator[Action]:
    """The update of what is not updated yet, and the end of the last renewal."""
    trained = [u for u, trains in enumerate(shape.trained) if trains]
    last = trained[-1:]
    if shape.in_backward:
        last = trained[:1]
    else:
        for u, before in zip(trained, [None, *trained], strict=False):
            yield from _update(shape, u, before)
    if not shape.sharded:
        yield from (Action("adopt", u) for u in last)


def evaluation(shape: StepShape) -> Iterator[Action]:
    """A forward pass over this rank's micro-batches, in which no input is kept and every layer runs."""
    step = _Step(replace(shape, stash=NOTHING, offload=False), update=False, fold="nothing")
    yield from step.forward(shape.layers, [_Part(0, range(shape.micro_batches))])
    yield from step.each("score", 0, range(shape.micro_batches))
    yield Action("free", shape.layers)
    yield Action("free", 0)


@lru_cache(maxsize=256)
def folded_step(shape: StepShape, fold: Fold = "rounds") -> tuple[Action, ...]:
    """A folded training step, made once."""
    return tuple(training_step(shape, fold=fold))


class _Part(NamedTuple):
    """Micro-batches of a round that pass together, and how many alike parts they stand for; `last`: of the round."""

    round: int
    members: range
    times: int = 1
    last: bool = True


_Wave = Sequence[_Part]


class _Step:
    """The parts of a step in order. One reduction is in flight at a time: the next one waits for it first."""

    def __init__(self, shape: StepShape, update: bool, fold: Fold) -> None:
        self._shape, self._fold = shape, fold != "nothing"
        self._updates = update and shape.in_backward
        self._in_flight: tuple[int, int, int] | None = None  # unit, round, times
        self._kept: list[tuple[int, int, int]] = []
        self._updated: int | None = None  # the unit whose renewal may be on its way

    def forward(self, last: int, wave: _Wave) -> Iterator[Action]:
        """Root and layers up to `last`; the model's very last layer stays for what follows."""
        shape, micros = self._shape, range(wave[0].members.start, wave[-1].members.stop)
        if shape.sharded:
            yield Action("gather", 0)
            yield Action("gather", 1)
        yield Action("bind", 0)
        yield from self.each("capture", 0, micros)
        for u in range(1, last + 1):
            yield Action("bind", u)
            if shape.sharded and u < shape.layers:
                yield Action("gather", u + 1)
            for visit in self._visits("forward", "stash", u, micros):
                yield from _written(visit) if u in shape.offloaded else (visit,)
            if u < shape.layers:
                yield Action("free", u)

    def head(self, wave: _Wave) -> Iterator[Action]:
        """The loss, and the un-recomputed layers, which stay whole for all rounds."""
        shape = self._shape
        kept = range(shape.boundary + 1, shape.layers + 1)
        if shape.sharded:
            yield from (Action("gather", u) for u in kept[1:])  # the first is on its way
        yield from (Action("bind", u) for u in kept)
        if shape.sharded and kept and shape.boundary >= shape.lowest:
            yield Action("gather", shape.boundary)
        for part in wave:
            yield from self.each("head", 0, part.members, part.round, part.times)
            for u in reversed(kept):
                yield from self._deliver(u, part)
        yield from (Action("free", u) for u in kept)

    def backward(self, wave: _Wave) -> Iterator[Action]:
        """The recomputed layers that train, or have one below that does."""
        shape = self._shape
        layers = range(shape.boundary, shape.lowest - 1, -1)
        visits = [visit for u in layers for part in wave for visit in self._backward(u, part)]
        inputs = iter(visits)
        yield from _read(
            next(inputs, None), shape, visits[-1].times if visits else 1
        )  # beside the last one none
        for u in layers:
            if u < shape.layers:  # the last one is still bound
                yield Action("bind", u)
            if shape.sharded and u > shape.lowest:
                yield Action("gather", u - 1)
            for part in wave:
                for visit in self._backward(u, part):
                    if shape.offload:
                        yield visit._replace(kind="fetch", products=())
                        yield from _read(next(inputs, None), shape, visit.times)
                    yield visit
                    # beside the next micro-batch's backward
                    if u == shape.lowest and shape.trained[0] and shape.embeds:
                        yield visit._replace(kind="embed", unit=0, products=())
                yield from self._deliver(u, part)
            yield Action("free", u)
        if shape.boundary == shape.layers < shape.lowest:  # the last one is bound, and the head trains alone
            yield Action("free", shape.layers)

    def embed(self, wave: _Wave) -> Iterator[Action]:
        """The root's gradient: the head's, which waited, and the embedding's."""
        shape = self._shape
        if shape.trained[0]:
            for part in wave:
                if (
                    part.round > 0
                ):  # it hides behind nothing, and a second large contribution would be there beside it
                    yield from self._settle()
                # Else it came with the lowest layer's backward.
                if shape.embeds and shape.boundary < shape.lowest:
                    yield from self.each("embed", 0, part.members, part.round, part.times)
                yield from self._deliver(0, part)
        yield Action("free", 0)

    def finish(self) -> Iterator[Action]:
        """Reduce what stage 1 kept, and wait for the last reduction."""
        for unit, round, times in self._kept:
            yield from self._reduce(unit, round, times)
        yield from self._settle()

    def each(
        self,
        kind: str,
        unit: int,
        micros: range,
        round: int = -1,
        times: int = 1,
        products: tuple[int, ...] = (),
    ) -> Iterator[Action]:
        """An action for each micro-batch, or for the first, the others and the last."""
        if self._fold and len(micros) > 3:
            yield Action(kind, unit, micros[0], round, times, products)
            yield Action(kind, unit, micros[1], round, times * (len(micros) - 2), products)
            micros = micros[-1:]
        yield from (Action(kind, unit, micro, round, times, products) for micro in micros)

    def _backward(self, unit: int, part: _Part) -> Iterator[Action]:
        """A recomputed layer's actions of a part of a round."""
        return self._visits("backward", "reuse", unit, part.members, part.round, part.times)

    def _visits(
        self, plain: str, keeping: str, unit: int, micros: range, round: int = -1, times: int = 1
    ) -> Iterator[Action]:
        """A layer's actions, of the kind `keeping` for micro-batches of which products stay."""
        border = self._shape.border
        for alike in (
            range(micros.start, min(micros.stop, border)),
            range(max(micros.start, border), micros.stop),
        ):
            products = self._shape.kept(unit, alike.start) if alike else ()
            yield from self.each(keeping if products else plain, unit, alike, round, times, products)

    def _deliver(self, unit: int, part: _Part) -> Iterator[Action]:
        """Where a round's sums of a unit are complete: reduce them, or at stage 1 keep them."""
        round, times = part.round, part.times
        if not self._shape.trained[unit] or not part.last:
            return
        if self._shape.zero_stage == 1:
            self._kept.append((unit, round, times))
            yield Action("keep", unit, round=round, times=times)
        else:
            yield from self._reduce(unit, round, times)

    def _reduce(self, unit: int, round: int, times: int) -> Iterator[Action]:
        yield from self._settle()
        yield Action("reduce", unit, round=round, times=times)
        if self._shape.zero_stage == 0 and round == self._shape.last_round:
            yield Action("replicate", unit)
        self._in_flight = unit, round, times

    def _settle(self) -> Iterator[Action]:
        if self._in_flight is None:
            return
        (unit, round, times), self._in_flight = self._in_flight, None
        yield Action("settle", unit, round=round, times=times)
        if self._updates and round == self._shape.last_round:
            yield Action("norm", unit)
            yield from _update(self._shape, unit, self._updated)
            self._updated = unit


def _written(visit: Action) -> Iterator[Action]:
    """A layer's forward, beside which its input is written."""
    yield visit._replace(kind="offload", products=())
    yield visit
    yield visit._replace(kind="evict", products=())


def _read(visit: Action | None, shape: StepShape, times: int = 1) -> Iterator[Action]:
    """Begin to read a backward's input, where it lies in the file; `times`: in a folded list, of the visits beside
    which reads are made, for in step with them the disk goes on."""
    if visit is not None and shape.offload:
        yield visit._replace(kind="prefetch", times=times, products=())


def _update(shape: StepShape, unit: int, before: int | None) -> Iterator[Action]:
    """Update a unit; where weights stay whole renew it, and adopt what was renewed in the meantime."""
    yield Action("update", unit)
    if not shape.sharded:
        yield Action("renew", unit)
        if before is not None:
            yield Action("adopt", before)


def _waves(shape: StepShape, fold: Fold) -> Iterator[_Wave]:
    """What passes all layers before the next does: all of the step, or some of a cell."""
    if not shape.wave:
        yield list(_rounds(shape, fold in ("rounds", "peak")))
        return
    rounds = list(_parts(shape))
    if fold == "peak":
        rounds = [[*parts[:2], *parts[2:][-1:]] for parts in (*rounds[:2], *rounds[2:][-1:])]
    yield from ([part] for parts in rounds for part in parts)


def _parts(shape: StepShape) -> Iterator[list[_Part]]:
    """Each round in waves; a round without a cell is one of no micro-batch, for its collectives."""
    starts = list(accumulate(shape.cells, initial=0))
    for r, size in enumerate(shape.cells):
        stop = starts[r] + size
        edges = [*range(starts[r], stop, shape.wave), stop] if size else [stop, stop]
        yield [_Part(r, range(a, b), last=b == stop) for a, b in pairwise(edges)]


def _rounds(shape: StepShape, fold: bool) -> Iterator[_Part]:
    """The rounds that pass together."""
    cells, border = shape.cells, shape.border
    starts, last = list(accumulate(cells, initial=0)), len(cells) - 1

    def kind(r: int) -> tuple[int, ...]:
        return (cells[r], starts[r] < border, starts[r + 1] <= border) if fold else (r,)

    groups = [
        [0],
        *(list(group) for _, group in groupby(range(1, last), kind)),
        *([last] for _ in cells[1:2]),
    ]
    for first, *more in groups:
        yield _Part(first, range(starts[first], starts[first + 1]), 1 + len(more))
