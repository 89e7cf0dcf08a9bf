"""What a step is made of: the kinds of actions, what their order depends on, and what plays them.

| kind | what happens |
|-----------|---------------------------------------------------------------------------------------------|
| gather    | begin to make a unit whole (stage 3)                                                        |
| bind      | wait until a unit is whole and put its tensors into the model                               |
| free      | take a unit's tensors out of the model; at stage 3 its buffer goes                          |
| capture   | embed a micro-batch, note what the model passes to its layers                               |
| forward   | one layer, one micro-batch                                                                  |
| stash     | the same, where results of products stay for the backward                                   |
| offload   | begin to write a layer's input of one micro-batch to the rank's file, beside its forward    |
| evict     | wait until it is written; its memory goes                                                   |
| head      | loss and gradients of head and un-recomputed layers, one micro-batch                        |
| score     | in an evaluation: loss or scores of one micro-batch                                         |
| prefetch  | begin to read a layer's input back, beside the backward before                              |
| fetch     | wait until it is there                                                                      |
| backward  | one layer's vjp, one micro-batch; the layer is recomputed                                   |
| reuse     | the same with what was stashed, which is not computed again                                 |
| embed     | the embedding's gradient, one micro-batch                                                   |
| keep      | stage 1: a round's sums are rounded to the wire's dtype and kept until the backward's end   |
| reduce    | begin to reduce a round's sums to their owners                                              |
| settle    | wait for a reduction; after the last round the totals are complete                          |
| replicate | stage 0: give the complete totals to every rank                                             |
| norm      | of all gradients, or of one unit's where units are updated in the backward                  |
| update    | a unit's weights and optimizer states                                                       |
| renew     | stages 0 to 2: begin to make the updated unit whole again                                   |
| adopt     | wait for a renewal; the old weights go                                                      |
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

ALL_UNITS = -1  # the unit of a norm over everything
_PASSES = ("capture", "forward", "stash", "backward", "reuse")
HANDED_OVER = frozenset((*_PASSES, "keep", "reduce", "settle", "norm", "update", "adopt"))


class Action(NamedTuple):
    """One thing that a rank does. `unit`: 0 is the root, i the i-th layer; `micro`: position among this rank's
    micro-batches of the step; `round`: of the reduction, which takes one of this rank's cells; -1 where it has none.

    `times`: how many actions in a row this one stands for, in a folded list; `micro` and `round` are then the first's.
    `products`: of stash and reuse, which results of the layer stay, by their numbers (`model.kept`).
    """

    kind: str
    unit: int = 0
    micro: int = -1
    round: int = -1
    times: int = 1
    products: tuple[int, ...] = ()


@dataclass(frozen=True)
class Stash:
    """Which results of recomputed layers stay on a rank: the first `visits` of a list of visits to layers.

    `order`: (unit, products), what saves most a byte first; each entry stands for a visit by every micro-batch of the
    rank, in order. So at most one is kept for some micro-batches and not for others, and one number says how far the
    memory goes.
    """

    order: tuple[tuple[int, tuple[int, ...]], ...] = ()
    visits: int = 0

    def products(self, unit: int, micro: int, micro_batches: int) -> tuple[int, ...]:
        """What stays of a layer for a micro-batch, in the order of the layer's calls."""
        if not self.visits:
            return ()
        entries = enumerate(self.order[: -(-self.visits // micro_batches)])
        found = (own for n, (u, own) in entries if u == unit and n * micro_batches + micro < self.visits)
        return tuple(sorted(product for own in found for product in own))

    def arrays(self, micro_batches: int) -> int:
        """How many results stay at most at a time, of so many micro-batches."""
        entries = enumerate(self.order)
        return sum(
            len(own) * min(max(self.visits - n * micro_batches, 0), micro_batches) for n, (_, own) in entries
        )


NOTHING = Stash()


@dataclass(frozen=True)
class StepShape:
    """What the order of a rank's step depends on.

    `cells`: number of this rank's micro-batches in each round (0 where it has no cell); `trained`: by unit, whether
    anything of it trains; `unrecomputed`: how many last layers keep their activations; `in_backward`: a unit is
    updated as soon as its gradient is complete; `run_ahead`: the next layer is handed to the device while one runs;
    `stash`: which results of the others stay from the forward to the backward; `wave`: how many micro-batches of a cell
    at most pass all layers before the others do, where weights stay whole; 0: all of the step pass together; `embeds`:
    whether something that the embedding uses is among what trains of the root; `offload`: inputs of recomputed layers
    go to a file, and come back for the backward.
    """

    zero_stage: int
    trained: tuple[bool, ...]
    cells: tuple[int, ...]
    unrecomputed: int = 0
    in_backward: bool = False
    run_ahead: bool = False
    stash: Stash = NOTHING
    wave: int = 0
    embeds: bool = True
    offload: bool = False

    def waits(self, action: Action) -> bool:
        """Whether the main thread waits for what the action evaluates, or hands it over and goes on."""
        sums_of_root = action.unit == 0 and action.kind in ("keep", "reduce")
        return not self.run_ahead or sums_of_root or action.kind not in HANDED_OVER

    @property
    def layers(self) -> int:
        """Number of layers, which is the last one's unit."""
        return len(self.trained) - 1

    @property
    def boundary(self) -> int:
        """The last layer that is recomputed; 0 where none is."""
        return self.layers - self.unrecomputed

    @cached_property
    def lowest(self) -> int:
        """The lowest layer that the backward reaches: layer 1 where the embedding trains, else the lowest that trains;
        beyond the last one where the head trains alone."""
        root, *layers = self.trained
        if root and self.embeds:
            return 1
        return layers.index(True) + 1 if any(layers) else self.layers + root

    @property
    def reached(self) -> int:
        """How many layers the backward reaches: the last ones."""
        return self.layers + 1 - self.lowest

    @property
    def offloaded(self) -> range:
        """The layers whose inputs go to a file: where that is asked for those that the backward recomputes."""
        return range(self.lowest, self.boundary + 1 if self.offload else self.lowest)

    @property
    def sharded(self) -> bool:
        """Whether weights are gathered where they are used (stage 3) and not kept whole."""
        return self.zero_stage == 3

    @property
    def last_round(self) -> int:
        """The round after which totals are complete."""
        return len(self.cells) - 1

    @property
    def micro_batches(self) -> int:
        """How many this rank has in the step."""
        return sum(self.cells)

    @property
    def border(self) -> int:
        """The micro-batch from which on, in one layer, less stays than of those before."""
        return self.stash.visits % max(self.micro_batches, 1)

    def kept(self, unit: int, micro: int) -> tuple[int, ...]:
        """The products of a layer that stay for a micro-batch: only where it is recomputed."""
        if self.lowest <= unit <= self.boundary:
            return self.stash.products(unit, micro, self.micro_batches)
        return ()


class Reader:
    """Plays a list of actions: calls the method named after each action's kind. An unknown kind is an error."""

    def play(self, actions: Iterable[Action]) -> None:
        """Every action in order. NotImplementedError for one that this reader has no method for."""
        for action in actions:
            play = getattr(self, action.kind, None)
            if play is None:
                raise NotImplementedError(f"{type(self).__name__} does not know the action {action.kind!r}")
            play(action)

    def nothing(self, action: Action) -> None:
        """For the kinds that mean nothing to a reader: it names them, so that it knows them."""
