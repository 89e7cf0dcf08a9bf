"""Steps of several daughters together: one streamed pass over the base, and for each its own loss, norm and update.

There are places; a daughter takes one, trains with its own data, schedule and step count, and leaves it to the next.
Micro-batches of one width pass side by side, whosever they are; of another width they pass for themselves, for a row
that is padded further has other bits. Counted tokens are weighted by 1 / their number in a daughter's step, so the sum
of all losses has each one's own gradient. Norm, clipping, dropout's masks and AdamW's step count are each one's.

With the optimizer in the backward a unit is updated when its gradient is complete: each daughter's tensors clipped by
the larger of its last step's norm and that of its units so far in this step (see `update`). A daughter whose gradient
is not finite is updated no more from that unit on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_empire.data.batches import MicroBatch
from mlx_empire.engine.store import ShardStore
from mlx_empire.engine.trainer import Trainer
from mlx_empire.model.lora import as_first_values, initial_adapter
from mlx_empire.model.spec import BLOCK, own_name
from mlx_empire.model.together import Present
from mlx_empire.optim.norm import clip_scale
from mlx_empire.optim.protocol import StepScalars
from mlx_empire.plan.shards import Placement, Segment


@dataclass(frozen=True)
class StepInput:
    """What one daughter brings to a step: micro-batches, their counted tokens, its own step (from 1) and the rate."""

    micro_batches: Sequence[MicroBatch]
    tokens: int
    step: int
    learning_rate: float


@dataclass(frozen=True)
class StepOutput:
    """What a step came to for one daughter: the mean loss over its counted tokens, and its gradient's norm."""

    loss: float
    norm: float


class MultiAdapterSteps:
    """Daughters in the places of a trainer whose model was put together for so many."""

    def __init__(self, trainer: Trainer, present: Present, clip_norm: float | None, seed: int) -> None:
        self._trainer, self._present = trainer, present
        self._clip_norm, self._seed = clip_norm, seed
        self._tensors: dict[int, list[str]] = {}
        for unit in trainer.spec.units:
            for tensor in (t for t in unit.tensors if t.trainable):
                self._tensors.setdefault(own_name(tensor.name)[0], []).append(tensor.name)
        self._slices: dict[int, list[_Slice]] = {}
        for name, (index, s, placement) in trainer.store.plan.tensors.items():
            if placement.tensor.trainable:
                own = _Slice.of(own_name(name)[0], trainer.store.plan.units[index].segments, s, placement)
                self._slices.setdefault(index, []).append(own)
        self._last_norms: dict[int, float] = {}
        self._inputs: Mapping[int, StepInput] = {}
        self._companies: list[_Company] = []
        if trainer.noise is not None:
            trainer.noise.states = present.states
        self._squares: dict[int, float] = {}  # by place, of the units so far
        self._released = trainer.work.optimizer_in_backward
        if self._released:
            trainer.update_by_unit(self._update_of_unit)
        # DoRA's magnitudes are norms of the base, which is not at hand in float32 when the next daughter begins.
        self._magnitudes = self._read(
            {n for names in self._tensors.values() for n in names if n.endswith(".m")}
        )

    @property
    def store(self) -> ShardStore:
        """Where the adapters and states of all places are."""
        return self._trainer.store

    def begin(self, place: int, start: Mapping[str, mx.array] | None = None) -> None:
        """Put a daughter that has learnt nothing into a place: first values, fresh states.

        `start`: the first values by mlx-lm's names, of an earlier adapter, all of them; None: fresh ones.
        """
        trainer, store = self._trainer, self._trainer.store
        self._last_norms[place] = 0.0
        store.put({name: self._first(name, start) for name in self._tensors[place]})
        names = set(self._tensors[place])
        for unit in store.plan.units:
            for segment, chunks in zip(unit.segments, store.chunks[unit.index], strict=True):
                for chunk in chunks if segment.kind != "frozen" else ():
                    if chunk.spec.name in names:
                        quantised = segment.kind == "trainable"
                        chunk.state = trainer.optimizer.init(chunk.weights, quantised=quantised)
                        mx.eval(chunk.state)

    def last_norm(self, place: int) -> float:
        """The gradient norm of the last step of the daughter in `place`, which one that goes on needs."""
        return self._last_norms[place]

    def carry_on(self, place: int, last_norm: float) -> None:
        """The daughter in `place` goes on after a step of this gradient norm."""
        self._last_norms[place] = last_norm

    def _first(self, name: str, start: Mapping[str, mx.array] | None) -> mx.array:
        if start is not None:
            return as_first_values(start[own_name(name)[1]])
        if name in self._magnitudes:
            return self._magnitudes[name]
        return initial_adapter(self._trainer.store.plan.tensors[name][2].tensor, self._seed)

    def step(self, inputs: Mapping[int, StepInput]) -> dict[int, StepOutput]:
        """One step of the daughters in these places; what it came to, by place.

        A daughter whose norm is not finite is not updated (where the update runs in the backward: no further): what
        becomes of it is the caller's business.
        """
        trainer, streamed, places = self._trainer, self._trainer.streamed, sorted(inputs)
        self._inputs, self._squares = inputs, dict.fromkeys(places, 0.0)
        self._companies = _companies(inputs)
        if trainer.noise is not None:
            at = [{p: (inputs[p].step, one.index) for p in one.places} for one in self._companies]
            trainer.noise.begin_together(at)
        streamed.before_micro = lambda position: self._present.are(self._companies[position].places)
        rows = streamed.gradients([[one.joined for one in self._companies]], 1, update=self._released)
        losses = _shared_out(rows, self._companies)
        if not self._released:
            for index in self._slices:
                self._add_squares(index)
        norms = {place: math.sqrt(squares) for place, squares in self._squares.items()}
        trainer.renew(self._scalars(norms, () if self._released else self._slices))
        self._last_norms |= norms
        return {place: StepOutput(losses[place], norms[place]) for place in places}

    def _update_of_unit(self, index: int) -> Callable[[str], StepScalars]:
        """By what each tensor of a unit is updated whose gradients are complete, in the backward."""
        self._add_squares(index)
        known = {p: max(self._last_norms[p], math.sqrt(s)) for p, s in self._squares.items()}
        return self._scalars(known, (index,))

    def held_out(self, place: int, batches: Sequence[MicroBatch], per_pass: int) -> float:
        """The mean loss of the daughter in `place`, at most `per_pass` micro-batches at a time."""
        streamed = self.with_only(place).streamed
        total = int(sum(b.mask.sum() for b in batches))
        losses: list[float] = []
        for first in range(0, len(batches), per_pass):
            losses += streamed.losses(batches[first : first + per_pass], total)
        return math.fsum(losses)

    def with_only(self, place: int) -> Trainer:
        """The trainer, whose model until the next step is that of the daughter in `place`."""
        self._present.are([place])
        return self._trainer

    def adapter(self, place: int) -> dict[str, mx.array]:
        """The adapter of the daughter in `place`, by mlx-lm's names, as copies that outlive its place."""
        found = self._read(set(self._tensors[place]))
        return {own_name(name)[1]: array for name, array in found.items()}

    def _read(self, names: Set[str]) -> dict[str, mx.array]:
        """Copies of these tensors, by name."""
        store = self._trainer.store
        found: dict[str, mx.array] = {}
        for index, unit in enumerate(self._trainer.spec.units):
            if not any(t.name in names for t in unit.tensors):
                continue
            store.bind(index)
            found |= {n: mx.array(np.array(a)) for n, a in store.tensors(index).items() if n in names}
            store.free(index)
        return found

    def _add_squares(self, index: int) -> None:
        """Add a unit to each daughter's squares: sums by tensor in fp32, added in fp64."""
        totals = self._trainer.gradients.totals[index]
        found: dict[int, list[mx.array]] = {}
        for own in (one for one in self._slices[index] if one.place in self._squares):
            rows = totals[own.segment][own.first : own.last].astype(mx.float32)
            found.setdefault(own.place, []).append(mx.sum(rows * rows))
        for place, sums in found.items():
            self._squares[place] += float(np.array(mx.stack(sums)).astype(np.float64).sum())

    def _scalars(self, norms: Mapping[int, float], units: Iterable[int]) -> Callable[[str], StepScalars]:
        """By what each tensor is updated, its daughter's gradients being clipped by these `norms`.

        A daughter with a norm that is not finite stays as it is, and so do those that are not present: their gradients
        in `units` become zeros, for NaN times zero would be NaN.
        """
        scalars = {
            p: StepScalars(given.step, given.learning_rate, clip_scale(norms[p], self._clip_norm))
            for p, given in self._inputs.items()
            if math.isfinite(norms[p])
        }
        for index in units:
            totals = self._trainer.gradients.totals[index]
            for own in (one for one in self._slices[index] if one.place not in scalars):
                totals[own.segment][own.first : own.last] = 0
        still = StepScalars(1, 0.0, 0.0)
        return lambda name: scalars.get(own_name(name)[0], still)


@dataclass(frozen=True)
class _Slice:
    """Where a unit's totals hold a tensor of the daughter in `place`: the segment among those that train, and rows."""

    place: int
    segment: int
    first: int
    last: int

    @classmethod
    def of(cls, place: int, segments: Sequence[Segment], index: int, placement: Placement) -> _Slice:
        trained = sum(segment.kind != "frozen" for segment in segments[:index])
        first = placement.start // BLOCK
        return cls(place, trained, first, first + placement.tensor.padded_size // BLOCK)


def _weighted(given: StepInput, index: int) -> MicroBatch:
    batch = given.micro_batches[index]
    mask = batch.mask / np.float32(max(given.tokens, 1))
    return MicroBatch(batch.inputs, batch.targets, mask, batch.documents, batch.rows_read)


@dataclass(frozen=True)
class _Company:
    """Micro-batch `index` of the daughters in these places, side by side: `joined` has their rows, in order."""

    index: int
    places: Sequence[int]
    joined: MicroBatch


def _companies(inputs: Mapping[int, StepInput]) -> list[_Company]:
    """What passes the model in a step, each daughter's micro-batches in their order."""
    found: list[_Company] = []
    for index in range(max(len(given.micro_batches) for given in inputs.values())):
        alike: dict[Hashable, dict[int, MicroBatch]] = {}
        for place in (p for p in sorted(inputs) if index < len(inputs[p].micro_batches)):
            batch = _weighted(inputs[place], index)
            alike.setdefault((batch.inputs.shape, batch.documents is None), {})[place] = batch
        found += [_Company(index, list(own), _joined(list(own.values()))) for own in alike.values()]
    return found


def _shared_out(by_row: Sequence[np.ndarray], companies: Sequence[_Company]) -> dict[int, float]:
    """Each daughter's loss of a step, by place; `by_row`: of the rows of each company."""
    sums: dict[int, list[float]] = {}
    for losses, company in zip(by_row, companies, strict=True):
        for place, own in zip(company.places, np.split(losses, len(company.places)), strict=True):
            sums.setdefault(place, []).append(own.sum(dtype=np.float64))
    return {place: math.fsum(own) for place, own in sums.items()}


def _joined(batches: Sequence[MicroBatch]) -> MicroBatch:
    """Rows of several daughters, of one shape each."""
    together = np.concatenate
    documents = [b.documents for b in batches if b.documents is not None]
    return MicroBatch(
        together([b.inputs for b in batches]),
        together([b.targets for b in batches]),
        together([b.mask for b in batches]),
        together(documents) if documents else None,
        tuple(row for b in batches for row in b.rows_read),
    )
