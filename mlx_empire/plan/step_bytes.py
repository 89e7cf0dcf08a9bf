"""What a step's actions hold, phase by phase: the reader of the schedule that counts bytes (`memory.ledger`).

Sizes of buffers follow from the plan and the order of events and are exact; what layers need while they are
differentiated is played from their graphs (`activations`).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

from mlx_empire.model.layer_passes import Adds
from mlx_empire.model.spec import BLOCK, ITEM_BYTES, ModelSpec, is_adapter
from mlx_empire.plan.actions import ALL_UNITS, Action, Reader
from mlx_empire.plan.activations import forward_bytes, head_costs, hidden_bytes, layer_costs
from mlx_empire.plan.kept import kept_bytes
from mlx_empire.plan.optimizer_bytes import StateBytes, update_bytes
from mlx_empire.plan.root_memory import RootMemory
from mlx_empire.plan.shards import SQUARED_ELEMENTS, Segment, ShardPlan
from mlx_empire.plan.workload import Workload, step_shape

Items = dict[str, int]

# Squared at once where nobody waits: as many pieces are in flight, as played.
NORM_AHEAD = 10 * SQUARED_ELEMENTS
PHASES = ("forward", "head", "backward", "embed", "release", "finish", "update")
_GATHERED = ("gathered root", "gathered units")
KEPT = "kept products"
FETCHED = "fetched layer inputs"
EMBEDDING = "embedding gradients"


class StepBytes(Reader):
    """What is alive on a rank, by name and in bytes, as the actions of a step are played.

    `phases` holds the worst moment of each phase. Sizes beside those of the moment (`_moment`) are in `_held`.
    """

    def __init__(
        self, spec: ModelSpec, plan: ShardPlan, work: Workload, rank: int, state_bytes: StateBytes
    ) -> None:
        self.shape = step_shape(plan, work, rank)
        self.phases: dict[str, Items] = {name: {} for name in PHASES}
        self._spec, self._plan, self._work = spec, plan, work
        self._rank, self._state_bytes = rank, state_bytes
        self._sizes = plan.sizes[rank]
        self._hidden, self._item = hidden_bytes(spec, work), ITEM_BYTES[spec.dtype]
        self._final = ITEM_BYTES[work.gradient_dtype]  # of an element of a finished gradient
        # A cell of one micro-batch keeps its gradients as they are; otherwise they are added up in fp32.
        self._adds_up = work.layout.micro_batches > work.layout.cells
        self._wide = 4 // self._item
        self._root = RootMemory(spec, work, self._sizes[0].gradient)
        self._first = set(accumulate(self.shape.cells, initial=0))  # micro-batches that begin a cell
        self._held: Items = {}
        self._total = self._most_others = 0
        self._passing = 0  # micro-batches that pass now: the step's, or a wave's
        self._worst = dict.fromkeys(PHASES, -1)
        self._phase = "forward"
        self._whole = self._most_whole = 0  # bytes of gathered units, now and at most
        self._stashed: dict[int, int] = {}  # by layer: bytes of its results that stay
        self._cell: dict[int, tuple[str, int]] = {}  # by layer: the name and size of the current round's sum
        self._joined: set[int] = set()  # rounds whose head's sum has become a part of the root's
        self._handed_over: set[int] = set()  # and those whose root's sum is a contribution
        self._embedding = 0  # bytes of one micro-batch's embedding beside its cell's sum: nobody waits for it
        self._embedded: dict[int, int] = {}  # by round: bytes of the embedding's sum
        self._flying = 0  # bytes of the last unit's update, which may not be done where it is not waited for
        self._own = 0  # of the unit that is updated
        self._new: dict[int, int] = {}  # by unit that was updated: bytes of its new weights on this rank

    bind = score = replicate = offload = evict = Reader.nothing

    @property
    def spare(self) -> int:
        """What the peak leaves for gradients beside the most that lies beside them at any moment."""
        return max(0, *self._worst.values()) - self._most_others

    # ---- bookkeeping

    def _hold(self, name: str, size: int) -> None:
        self._held[name] = self._held.get(name, 0) + size
        self._total += size

    def _moment(self, now: Mapping[str, int], phase: str | None = None) -> None:
        """What is held, and `now` besides: the worst moment of a phase is kept."""
        phase = phase or self._phase
        total = self._total + sum(now.values())
        self._most_others = max(self._most_others, total - self._held.get("gradients", 0))
        if total > self._worst[phase]:
            self._worst[phase] = total
            items = dict(self._held)
            for name, size in now.items():
                items[name] = items.get(name, 0) + size
            self.phases[phase] = {name: size for name, size in items.items() if size}

    # ---- weights

    def gather(self, action: Action) -> None:
        """Buffers of units that are whole; those of earlier ones are handed out again, so they only grow in number."""
        self._whole += self._sizes[action.unit].gathered
        more = self._whole - self._most_whole
        if more > 0:
            self._most_whole += more
            self._hold(_GATHERED[action.unit > 0], more)

    def free(self, action: Action) -> None:
        if self.shape.sharded:
            self._whole -= self._sizes[action.unit].gathered
        if action.unit == 0:
            self._hold("layer inputs", -self._held.get("layer inputs", 0))
            self._phase, self._passing = "finish", 0
        elif self._phase in (
            "backward",
            "embed",
        ):  # its inputs went one by one; they count until the layer is left
            if not self.shape.offload:
                self._hold("layer inputs", -self._hidden * self._passing)
            self._hold(KEPT, -self._stashed.pop(action.unit, 0))

    # ---- micro-batches

    def capture(self, action: Action) -> None:
        self._phase = "forward"
        self._passing += action.times
        self._hold("layer inputs", self._hidden * action.times)

    def forward(self, action: Action) -> None:
        """Its input stays where a backward comes back to it, but where it is written meanwhile."""
        stays = action.unit >= self.shape.lowest and not self.shape.offload
        kept = self._hidden if stays else 0
        unit = self._spec.units[action.unit]
        stashed = kept_bytes(unit, action.products, self._spec, self._work)
        self._stashed[action.unit] = self._stashed.get(action.unit, 0) + stashed * action.times
        self._hold("layer inputs", kept * (action.times - 1))
        self._hold(KEPT, stashed * action.times)
        self._moment({"one layer's forward": forward_bytes(unit, self._spec, self._work)})
        self._hold("layer inputs", kept)

    stash = forward

    def head(self, action: Action) -> None:
        self._phase = "head"
        kept = self._spec.units[self.shape.boundary + 1 :]
        for moment in head_costs(kept, self._spec, self._work, adds=self._adds(action)):
            self._moment(self._of_narrow(action, moment, "un-recomputed tail", "tail sums"))
        second = action.micro - 1 in self._first
        if not kept and action.micro not in self._first:
            self._moment({"root gradients": self._root.added(1 if second else 2)})
        if action.micro in self._first:
            self._hold("root gradients", self._root.head_sum(1) * action.times)
        elif second:
            others = max(self.shape.cells[action.round] - 2, 1)
            rounds = 1 if self.shape.wave else action.times // others  # alike ones that it stands for
            self._hold("root gradients", (self._root.head_sum(2) - self._root.head_sum(1)) * rounds)
        for u in range(self.shape.boundary + 1, self.shape.layers + 1):
            self._hold_cell(action, u, "tail sums")

    def prefetch(self, action: Action) -> None:
        """The next input lies beside the one of the layer that is differentiated."""
        self._phase = "backward"
        self._hold(FETCHED, self._hidden)
        self._moment({})

    fetch = Reader.nothing

    def backward(self, action: Action) -> None:
        self._phase = "backward"
        if self._plan.world_size == 1:  # a copy, done before the layer's worst moment
            self._hold("contributions in flight", -self._held.get("contributions in flight", 0))
        unit = self._spec.units[action.unit]
        adds, kept = self._adds(action), action.products
        if not self._is_surpassed(action):
            costs = layer_costs(unit, self._spec, self._work, adds=adds, kept=kept)
            self._moment(self._of_narrow(action, costs, "one layer's recompute", "unit gradient sums"))
        self._hold_cell(action, action.unit, "unit gradient sums")
        if self.shape.offload:
            self._hold(FETCHED, -self._hidden)

    reuse = backward

    def embed(self, action: Action) -> None:
        """A cell's sum is there from its first micro-batch until the root is reduced. The rest may still be there while
        the lowest layer's next micro-batch is differentiated."""
        self._phase = "embed"
        self._hold(EMBEDDING, -self._embedding)
        if action.micro in self._first:
            # Behind a whole tail a round's come with its reduction: no other one's are there.
            rounds = action.times if self.shape.boundary >= self.shape.lowest else 1
            self._embedded[action.round] = self._root.embedding_sum(self.shape.cells[action.round]) * rounds
            self._hold(EMBEDDING, self._embedded[action.round])
        self._embedding = self._root.embedding_beside(4 * self._hidden // self._item)
        self._hold(EMBEDDING, self._embedding)
        self._moment({})

    def _adds(self, action: Action) -> Adds:
        """What gradients are added to: a cell's first are left as they are, the second make a sum in fp32 of them."""
        if action.micro in self._first:
            return ""
        return "own" if self._item < 4 and action.micro - 1 in self._first else "wide"

    def _is_surpassed(self, action: Action) -> bool:
        """Whether the cell's next micro-batch needs more in any case: a sum lies beside what this one needs. That of
        adapters is small: in a bfloat16 model it may be less than what the next one's other order saves.
        """
        alike = not self.shape.run_ahead and not self.shape.stash.visits
        shown = self._item == 4 or not any(is_adapter(t.name) for t in self._spec.units[action.unit].tensors)
        return alike and shown and action.micro in self._first and self.shape.cells[action.round] > 1

    # ---- sums

    def keep(self, action: Action) -> None:
        if self._root.joins_first:
            self._join(action)
        self._moment(self._copy(action))
        self._drop_cell(action)
        self._hold("contributions kept whole", self._contribution(action) * action.times)

    def reduce(self, action: Action) -> None:
        """Totals are there from the first round on."""
        size = self._sizes[action.unit]
        if self.shape.zero_stage != 1 and self._root.joins_first:
            self._join(action)
        if action.round == 0:
            self._hold("gradients", 4 * size.trained)
        if self.shape.zero_stage == 1:
            self._moment({})
        else:
            self._moment(self._copy(action))
            self._drop_cell(action)
            self._hold("contributions in flight", self._contribution(action))

    def _copy(self, action: Action) -> Items:
        """Of a sum that is handed over a layer's tensors are made flat at once, the root's one at a time."""
        if not self._contribution(action):
            return {}
        size = self._sizes[action.unit]
        if (
            action.unit == 0 and not self._root.by_row
        ):  # whole sums are waited for, and nothing is beside them
            self._hold(EMBEDDING, -self._embedding)
            self._embedding = 0
        root = {"root gradients": self._root.copied(size.largest)}
        return {"unit gradient sums": size.gradient} if action.unit else root

    def _join(self, action: Action) -> None:
        """Head's and embedding's sums of a round become the root's, if they have not."""
        if action.unit == 0 and self.shape.cells[action.round] and action.round not in self._joined:
            self._joined.add(action.round)
            micro_batches = self.shape.cells[action.round]
            self._moment({"root gradients": self._root.joined(micro_batches)})
            self._hold("root gradients", self._root.widened(micro_batches))

    def settle(self, action: Action) -> None:
        if self.shape.zero_stage == 1:
            self._hold("contributions kept whole", -self._contribution(action) * action.times)
        else:
            self._hold("contributions in flight", -self._held.get("contributions in flight", 0))
        if action.round == self.shape.last_round:
            self._hold("gradients", -(4 - self._final) * self._sizes[action.unit].trained)

    def _contribution(self, action: Action) -> int:
        """Bytes of a unit's contribution in the wire's dtype; none where this rank has no cell in the round."""
        return self._sizes[action.unit].gradient if self.shape.cells[action.round] else 0

    def _hold_cell(self, action: Action, unit: int, name: str) -> None:
        """A cell's sum of a layer, from its first micro-batch until it is handed over, as long as it becomes."""
        if action.micro in self._first:
            wide = self._wide if self.shape.cells[action.round] > 1 else 1
            self._cell[unit] = name, self._sizes[unit].gradient * wide
            self._hold(*self._cell[unit])

    def _of_narrow(self, action: Action, costs: Items, rest: str, sums: str) -> Items:
        """What a cell's second micro-batch needs: until then its sums are as short as one micro-batch's gradients."""
        if self._adds(action) != "own":
            return costs
        held = self._cell.items() if action.kind == "head" else [(action.unit, self._cell[action.unit])]
        short = sum(size - self._sizes[unit].gradient for unit, (name, size) in held if name == sums)
        taken = min(costs.get(rest, 0), short)
        return costs | {rest: costs.get(rest, 0) - taken, sums: taken - short}

    def _drop_cell(self, action: Action) -> None:
        """A round's sum is handed over, if it has not been."""
        name, size = self._cell.pop(action.unit, ("", 0))
        if action.unit == 0 and self.shape.cells[action.round] and action.round not in self._handed_over:
            self._handed_over.add(action.round)
            self._join(action)
            micro_batches = self.shape.cells[action.round]
            size = self._root.head_sum(micro_batches) * action.times + self._root.widened(micro_batches)
            name = "root gradients"
            self._hold(EMBEDDING, -self._embedding - self._embedded.pop(action.round, 0))
            self._embedding = 0
        self._hold(name, -size)

    # ---- update

    @property
    def _updating(self) -> str:
        """The phase of what the optimizer does: at the step's end, or within the backward."""
        return "update" if self._phase == "finish" else "release"

    def norm(self, action: Action) -> None:
        """The squares of as many gradients at once as the largest unit has, or of a piece of them, and their sums by
        halves; running ahead, of as many pieces as are in flight."""
        units = self._plan.units if action.unit == ALL_UNITS else (self._plan.units[action.unit],)
        self._flying = 0
        rows = [self._sizes[unit.index].trained for unit in units]
        at_once, most = max(rows, default=0), SQUARED_ELEMENTS
        if self.shape.run_ahead:
            at_once, most = sum(rows), NORM_AHEAD
        self._moment({"norm of gradients": 2 * 4 * min(at_once, most)}, self._updating)

    def update(self, action: Action) -> None:
        """Segment by segment: its new weights, and what the optimizer's calls need besides. Where weights do not stay
        whole, a chunk's old ones go with its update: only those of the chunks that are evaluated now are new."""
        new, before = 0, self._flying
        self._flying = self._own = 0
        one_by_one = self.shape.sharded and self.shape.waits(action)
        for segment in self._plan.units[action.unit].segments:
            if segment.kind != "frozen":
                a, b = self._plan.state_interval(segment, self._rank)
                chunk, at_once = update_bytes(segment, a, b, self._state_bytes, in_place=one_by_one)
                new = at_once * segment.itemsize if one_by_one else new + (b - a) * segment.itemsize
                if not self.shape.waits(action):
                    chunk = self._in_flight(segment, chunk, b - a, before)
                self._moment({"optimizer chunk": chunk, "new weights of a unit": new}, self._updating)
        self._hold("gradients", -self._final * self._sizes[action.unit].trained)
        self._new[action.unit] = new

    def _in_flight(self, segment: Segment, chunk: int, elements: int, before: int) -> int:
        """What chunks hold at most that are handed over and may not be done: of this unit, up to `segment`, and of the
        one before, whose gradients and, at stage 3, new weights they keep as well."""
        sizes = self._state_bytes(BLOCK, segment.dtype, quantised=segment.kind == "trainable")
        more = self._final + segment.itemsize * self.shape.sharded
        self._flying += int((sizes.alone + more) * elements)
        self._own += int(sizes.alone * elements)
        most = sizes.calls_ahead * chunk * (sizes.alone + more) / sizes.alone
        return max(chunk, min(before + self._own, int(most)))

    def renew(self, action: Action) -> None:
        self._hold("new weights of a unit", self._new[action.unit])
        self._moment({}, self._updating)

    def adopt(self, action: Action) -> None:
        self._hold("new weights of a unit", -self._new[action.unit])
