"""The memory ledger: what a rank needs, by name, in bytes, and in which phase of a step it needs it.

`resident` is there for the whole step; each phase (forward, head, backward, embed, finish, update) adds what is alive
in it alone, at its worst moment. The peak is resident + the largest phase. Sizes of buffers follow from the plan and
the engine's order of events and are exact; what layers need while they are differentiated is fitted (`activations`).
`terms` says both of every name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from mlx_empire.plan.activations import forward_bytes, hidden_bytes, layer_costs, tail_costs
from mlx_empire.plan.model import ITEM_BYTES, ModelSpec
from mlx_empire.plan.roots import root_use
from mlx_empire.plan.shards import Segment, ShardPlan, Unit, UnitSizes
from mlx_empire.plan.traffic import staging_bytes
from mlx_empire.plan.updating import temporaries
from mlx_empire.plan.workload import Workload, chunk_tokens, first_trained


class StateBytes(Protocol):
    """The optimizer's answer: bytes of its state by name."""

    def __call__(self, elements: int, weight_dtype: str, *, quantised: bool) -> Mapping[str, int]: ...


Items = dict[str, int]

LOGITS_COPIES = 3.15  # fp32 arrays of a chunk's logits alive in the gradient of the loss
SOFT_CAPPED = 2.0  # more of them where logits are soft-capped
BASE = 1 << 19  # MLX buffers that are no tensor: rotary tables, scalars, masks
ROUNDING = 1 << 13  # half a page of Metal's allocator


@dataclass(frozen=True)
class Ledger:
    """Bytes by name: for the whole step, and by phase."""

    resident: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]

    @cached_property
    def largest_phase(self) -> str:
        """The phase that sets the peak."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @cached_property
    def peak(self) -> int:
        """Bytes needed at the worst moment of a step."""
        return sum(self.resident.values()) + sum(self.phases[self.largest_phase].values())

    def items(self) -> dict[str, int]:
        """What makes up the peak, by name."""
        return {**self.resident, **self.phases[self.largest_phase]}


def ledger(spec: ModelSpec, plan: ShardPlan, work: Workload, rank: int, state_bytes: StateBytes) -> Ledger:
    """What `rank` needs for a training step of `work`; `state_bytes` comes from the optimizer."""
    states = state_sizes(plan, rank, state_bytes)
    sizes = plan.sizes[rank]
    adapters = sum(s.adapters for s in sizes)
    staging = max((_staging(u, rank, work.bucket_bytes) for u in plan.units), default=0)
    resident = {
        "weights": sum(s.kept for s in sizes) - adapters,
        "adapters": adapters,
        **states,
        "exchange buffers": staging,
        "MLX base": BASE,
        "allocator margin": ROUNDING * sum(_odd_arrays(s) for u in plan.units for s in u.segments),
    }
    step = _Step(spec, plan, work, rank, states)
    root = {"gathered root": sizes[0].gathered if plan.zero_stage == 3 else 0}  # until the update
    phases = {
        "forward": root | step.forward(),
        "head": root | step.head(),
        "backward": root | max(step.backward(), key=lambda items: sum(items.values())),
        "embed": root | step.embed(),
        "release": root | max(step.release(), key=lambda items: sum(items.values())),
        "finish": step.finish(),
        "update": step.update(),
    }
    return Ledger({k: v for k, v in resident.items() if v}, phases)


class _Step:
    """The worst moment of each phase, from what is alive then. Bytes throughout."""

    def __init__(
        self, spec: ModelSpec, plan: ShardPlan, work: Workload, rank: int, states: Mapping[str, int]
    ) -> None:
        self.spec, self.plan, self.work, self.states = spec, plan, work, states
        self.rank = rank
        self.sizes = plan.sizes[rank]
        self.layers = self.sizes[1:]
        self.cut = len(self.layers) - work.tail
        self.first = min(first_trained(plan) - 1, self.cut)  # the backward ends here: nothing below trains
        self.micro = work.micro_batches(rank)
        self.hidden = hidden_bytes(spec, work)
        self.item = ITEM_BYTES[spec.dtype]
        self.sharded = plan.zero_stage == 3
        self.alone = plan.world_size == 1
        self.rounds = sum(1 for cell in work.layout.of_rank(rank) if len(cell))
        # A cell of one micro-batch keeps its gradients as they are; otherwise they are added up in fp32.
        self.adds_up = work.layout.micro_batches > work.layout.cells
        self.widening = 4 // self.item
        self.head_use, self.embed_use = root_use(spec)

    # ---- the phases

    def forward(self) -> Items:
        specs = self.spec.units[1 : 1 + self.cut]
        worst = max((forward_bytes(u, self.spec, self.work) for u in specs), default=0)
        return {
            "gathered units": self._gathered(*self.layers[: self.cut + 1], most=2),
            "layer inputs": (self._inputs(self.cut) + 1) * self.hidden,
            "one layer's forward": worst,
        }

    def head(self) -> Items:
        chunk = min(self._chunk_tokens, self.work.tokens)
        chunked = self.work.tokens > chunk
        head = self.head_use * self.item
        one = (
            head * self.widening if chunked else head
        )  # the gradients of one micro-batch, all chunks together
        sums = self._head_sums if self.adds_up else self._head_sums - self._head_sums // max(self.rounds, 1)
        # In fewer bits than fp32 the head's own logits and their gradient lie beside the wide ones.
        logits = chunk * self._vocabulary * (4 * LOGITS_COPIES + 2 * self.item * (self.item < 4))
        soft = self.spec.family == "gemma2" or self.spec.text_config.get("final_logit_softcapping")
        logits += 4 * chunk * self._vocabulary * SOFT_CAPPED if soft else 0
        tail = self.layers[self.cut :]
        ahead = self.layers[self.cut - 1 : self.cut] if self.cut > self.first else ()
        trained = sum(s.trained for s in tail)
        items = {
            "gathered units": self._gathered(*ahead, *tail, most=len(tail) + 1),
            "layer inputs": (self._inputs(self.cut) + 2) * self.hidden,
            "root gradients": sums + one + head * chunked,
        }
        if not tail:
            return {**items, "logits chunk": int(logits)}
        late = 2 * trained if self.work.gradient_dtype == "bfloat16" and self.rounds > 1 else 0
        items |= {
            "tail sums": sum(s.gradient for s in tail) * self.widening * self.adds_up,
            "gradients": self._kept_gradients(trained) if self.rounds > 1 else 0,
            "tail totals before rounding": late,
        }
        kept, start, end = tail_costs(self.spec.units[1 + self.cut :], self.spec, self.work)
        loss = {**items, "un-recomputed tail": kept, "logits chunk": int(logits)}
        beginning, ending = {**items, **start}, {**items, **end}
        beginning["root gradients"] += one  # evaluated before the tail's, and not yet added up
        ending["root gradients"] += 0 if self.adds_up else one
        return max(loss, beginning, ending, key=lambda items: sum(items.values()))

    def backward(self) -> Iterator[Items]:
        """One moment for every recomputed layer: as gradients become complete, the layers' inputs go."""
        if self.cut == self.first:
            yield {}
        complete = sum(s.trained for s in self.layers[self.cut :])
        for i in reversed(range(self.first, self.cut)):
            layer = self.layers[i]
            in_flight = 0
            # Alone the exchange is a copy, done before a second micro-batch; with peers it takes as long as it takes.
            if i + 1 < self.cut and self.plan.zero_stage != 1 and not (self.alone and self.adds_up):
                previous = self.layers[i + 1]
                kept = 0 if self.work.release else self._final
                in_flight = previous.gradient + previous.trained * (4 - kept)
            yield {
                "gradients": self._kept_gradients(complete),
                "gathered units": self._gathered(*self.layers[max(i - 1, self.first) : i + 1], most=2),
                "layer inputs": self._inputs(i + 1) * self.hidden,
                "root gradients": self._head_sums,
                "unit gradient sums": layer.gradient * self.widening * self.adds_up,
                "contributions in flight": in_flight,
                "contributions kept whole": self._deferred(self.layers[i + 1 :]),
                **layer_costs(self.spec.units[1 + i], self.spec, self.work),
            }
            complete += layer.trained

    def embed(self) -> Items:
        root = self.sizes[0]
        embed = self.embed_use * self.item
        computing = embed * self.widening * self.adds_up + 2 * embed + self._head_sums
        delivering = 0
        if self.plan.zero_stage != 1:
            contribution = root.gradient * (self.widening if self.adds_up else 1)
            delivering = contribution + 4 * root.trained + root.largest
            delivering += self._head_sums * (self.rounds - 1) // max(self.rounds, 1)
        in_flight = self.layers[0].gradient if self.plan.zero_stage != 1 and self.cut > 0 else 0
        return {
            "gradients": self._kept_gradients(sum(s.trained for s in self.layers)),
            "root gradients": max(computing, delivering - in_flight),
            "layer inputs": self.micro * self.hidden,
            "contributions in flight": in_flight,
            "contributions kept whole": self._deferred(self.layers),
        }

    def finish(self) -> Items:
        """Stage 1 alone: all contributions wait for the backward's end and become totals unit by unit."""
        if self.plan.zero_stage != 1:
            return {}
        held = [self._deferred([s]) for s in self.sizes]
        order = [*range(len(held) - 1, 0, -1), 0]
        done, waiting, worst = 0, sum(held), (0, 0)
        for index in order:
            done += self._final * self.sizes[index].trained
            extra = (4 - self._final) * self.sizes[index].trained + self.sizes[index].largest
            worst = max(worst, (done + waiting + extra, waiting))
            waiting -= held[index]
            if self.work.release:  # and its update, before the next one's reduction begins
                worst = max(
                    worst,
                    (waiting + done + sum(self._update_of(index, self._before(index)).values()), waiting),
                )
                done = 0
        return {"contributions kept whole": worst[1], "gradients": worst[0] - worst[1]}

    def release(self) -> Iterator[Items]:
        """With gradient release: a layer's update in the backward, while the sums of the layer below wait."""
        if not self.work.release or self.plan.zero_stage == 1:
            yield {}
            return
        tail = self.layers[self.cut :]
        for i in reversed(range(self.first, len(self.layers))):
            below = self.layers[max(i - 1, self.first) : i]
            whole = self._gathered(*self.layers[max(i - 2, self.first) : i], most=2)
            if i > self.cut:  # an un-recomputed layer: the whole tail is still there
                below, whole = self.layers[self.cut : i], self._gathered(*tail, most=len(tail))
            inputs = self._inputs(min(i, self.cut))
            yield {
                "gradients": self.layers[i].trained * self._final,
                "gathered units": whole,
                "layer inputs": inputs * self.hidden,
                "root gradients": self._head_sums if i else self._root_sums,
                "unit gradient sums": sum(s.gradient for s in below) * (self.widening if self.adds_up else 1),
                **self._update_of(i + 1, self._before(i + 1)),
            }

    def update(self) -> Items:
        """Gradients go unit by unit; a unit's old weights stay until all of its new ones are there.

        With gradient release only the root is left for the end.
        """
        left = sum(s.trained for s in self.sizes[: 1 if self.work.release else None])
        before = self._before(0) if self.work.release else None
        worst: Items = {}
        for index in range(1 if self.work.release else len(self.sizes)):
            one = {"gradients": left * self._final, **self._update_of(index, before)}
            worst = max(worst, one, key=lambda items: sum(items.values()))
            left -= self.sizes[index].trained
            before = index
        return worst

    # ---- the update of one unit

    def _before(self, index: int) -> int | None:
        """The unit that is updated before `index` in the backward."""
        return index + 1 if index + 1 < len(self.sizes) else None

    def _update_of(self, index: int, before: int | None) -> Items:
        """At its worst moment; below stage 3 unit `before` is being renewed meanwhile, and then the unit itself."""
        renewing = 0 if self.sharded or before is None else self._new(before)
        unit, new = self.plan.units[index], 0
        worst: Items = {"new weights of a unit": self._new(index) + renewing} if not self.sharded else {}
        for segment in unit.segments:
            if segment.kind == "frozen":
                continue
            a, b = self.plan.state_interval(segment, self.rank)
            new += (b - a) * segment.itemsize
            chunk = temporaries(segment, a, b, self.states)
            one = {"optimizer chunk": chunk, "new weights of a unit": new + renewing}
            worst = max(worst, one, key=lambda items: sum(items.values()))
        return worst

    def _new(self, index: int) -> int:
        """Bytes of a unit's new weights on this rank."""
        trained = [s for s in self.plan.units[index].segments if s.kind != "frozen"]
        intervals = [(self.plan.state_interval(s, self.rank), s.itemsize) for s in trained]
        return sum((b - a) * item for (a, b), item in intervals)

    @property
    def _root_sums(self) -> int:
        """The root's contribution when it is handed over."""
        return self.sizes[0].gradient * (self.widening if self.adds_up else 1) * max(self.rounds, 1)

    # ---- what several phases have

    @property
    def _vocabulary(self) -> int:
        return int(self.spec.text_config.get("vocab_size") or 0)

    def _inputs(self, layers: int) -> int:
        """Hidden states when the inputs of the layers up to `layers` are kept, and what all micro-batches are at."""
        return (layers - self.first + 1) * self.micro

    @property
    def _chunk_tokens(self) -> int:
        return chunk_tokens(self._vocabulary, frozen=self.spec.frozen_root)

    @property
    def _final(self) -> int:
        """Bytes of an element of a finished gradient."""
        return ITEM_BYTES[self.work.gradient_dtype]

    @property
    def _head_sums(self) -> int:
        widened = self.adds_up or self.work.tokens > self._chunk_tokens
        return self.head_use * self.item * (self.widening if widened else 1) * self.rounds

    def _kept_gradients(self, trained: int) -> int:
        return 0 if self.work.release or self.plan.zero_stage == 1 else trained * self._final

    def _deferred(self, units: tuple[UnitSizes, ...] | list[UnitSizes]) -> int:
        return sum(s.gradient for s in units) * self.rounds if self.plan.zero_stage == 1 else 0

    def _gathered(self, *units: UnitSizes, most: int) -> int:
        """Of `units`, the `most` neighbours that are whole at the same time."""
        if not self.sharded or not units:
            return 0
        whole = [s.gathered for s in units]
        return max(sum(whole[i : i + most]) for i in range(max(len(whole) - most, 0) + 1))


def _odd_arrays(segment: Segment) -> int:
    """Arrays that may not fill their last page: a segment's buffer, and small tensors' states."""
    return 1 + (len(segment.placements) if segment.kind == "small" else 0)


def state_sizes(plan: ShardPlan, rank: int, state_bytes: StateBytes) -> Items:
    """The optimizer's state on `rank` by name, each beginning with `optimizer`."""
    elements: dict[tuple[str, bool], int] = {}
    for unit in plan.units:
        for segment in unit.segments:
            if segment.kind != "frozen":
                a, b = plan.state_interval(segment, rank)
                kind = segment.dtype, segment.kind == "trainable"
                elements[kind] = elements.get(kind, 0) + b - a
    named: Items = {}
    for (dtype, quantised), count in elements.items():
        for name, size in state_bytes(count, dtype, quantised=quantised).items():
            named[f"optimizer {name}"] = named.get(f"optimizer {name}", 0) + size
    return named


def _staging(unit: Unit, rank: int, bucket_bytes: int) -> int:
    segments = unit.segments
    trained = [s for s in segments if s.kind != "frozen"]
    return max((staging_bytes(s.edges, s.itemsize, rank, bucket_bytes) for s in trained), default=0)
