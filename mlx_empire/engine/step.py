"""One training step, layer-major: every micro-batch of a rank passes a layer before the next layer is touched.

So each unit is gathered twice a step however many micro-batches there are, a unit's gradient is complete after one
visit, and only one or two units are ever whole. The phases of a step on each rank:

1. capture   the model's call with slots: the input of layer 0 of every micro-batch and the layers' arguments;
2. forward   layer by layer: gather (the next one's is on its way), run all micro-batches, keep only their inputs;
3. head      loss and gradients of norm and head in chunks, and the boundary's cotangent. The last k layers (the
             un-recomputed tail) run here, once, as one graph with the head;
4. backward  layer by layer, last to first: gather, vjp of each micro-batch (which recomputes the layer), add up per
             cell, hand the sum over to be reduced while the next layer is computed;
5. embed     the embedding's gradient from the cotangent of layer 0's input; then the root's sum is handed over.

Everything is evaluated between the calls of `mx.vjp`, outside any transformation, so memory is freed as it goes, and
collectives only ever see evaluated arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_empire import phases
from mlx_empire.data.batches import MicroBatch
from mlx_empire.engine.gradients import CellSum, GradientStore
from mlx_empire.engine.loss import head_chunks, head_gradients, head_loss, head_scores, joined, of_all_rows
from mlx_empire.engine.masks import separate
from mlx_empire.engine.noise import LayerNoise
from mlx_empire.engine.slots import Deck, LayerArguments, hidden_of
from mlx_empire.engine.store import ShardStore
from mlx_empire.errors import UserError
from mlx_empire.plan.workload import chunk_tokens, first_trained


@dataclass
class _Running:
    """A micro-batch on its way: tokens as MLX arrays, the current hidden state or cotangent, the layers' inputs, in the
    end the losses of its rows.

    `position` counts this rank's micro-batches of the step.
    """

    position: int
    batch: tuple[mx.array, mx.array, mx.array]
    arguments: list[LayerArguments]
    documents: mx.array | None
    hidden: mx.array
    inputs: list[mx.array | None]
    loss: mx.array | None = None

    def take_input(self, layer: int) -> mx.array:
        """The kept input of a layer, which is forgotten here."""
        kept, self.inputs[layer] = self.inputs[layer], None
        assert kept is not None
        return kept


Rounds = list[list[_Running]]


class StreamedStep:
    """Runs forward and backward over micro-batches, given the model's deck, the weights and the gradient totals.

    `tail` is k, the number of last layers that are not recomputed; `head_tensors` and `embed_tensors` are positions
    among the root's trainable tensors that the head and the embedding depend on (a tied matrix stands in both);
    `noise` is there where layers have dropout.
    """

    def __init__(
        self,
        deck: Deck,
        store: ShardStore,
        *,
        tail: int,
        vocabulary: int,
        head_tensors: Sequence[int],
        embed_tensors: Sequence[int],
        noise: LayerNoise | None = None,
    ) -> None:
        self._deck, self._store, self._noise = deck, store, noise
        self._cut = len(deck.layers) - tail  # layers before it are recomputed
        self._head_tensors, self._embed_tensors = list(head_tensors), list(embed_tensors)
        self._tokens = chunk_tokens(vocabulary, frozen=not store.trainable(0))
        self._first = first_trained(store.plan) - 1  # the backward ends here: no layer below trains
        self._lowest = self._first if not embed_tensors else -1  # the input of this layer needs no cotangent

    def gradients(
        self, rounds: Sequence[Sequence[MicroBatch]], total_tokens: int, sums: GradientStore
    ) -> list[np.ndarray]:
        """By micro-batch of this rank its rows' losses (already divided by the global count), gradients into `sums`.

        `rounds` holds this rank's cells; a round without a cell is an empty list and still joins the collectives.
        """
        total = mx.array(float(total_tokens), mx.float32)
        phases.reach("forward")
        running = self._capture(rounds)
        flat = [r for one in running for r in one]
        self._forward(flat, self._cut)
        phases.reach("backward")
        head_sums = self._head(running, total, sums)
        self._backward(running, sums)
        self._embed(running, head_sums, sums)
        self._store.release(0)
        return [np.array(r.loss) for r in flat if r.loss is not None]

    def losses(self, batches: Sequence[MicroBatch], total_tokens: int) -> list[float]:
        """Forward only, for evaluation: the loss of each micro-batch, divided by `total_tokens`."""
        total = mx.array(float(total_tokens), mx.float32)
        return [
            of_all_rows(by_row)
            for by_row in self._evaluated(
                batches,
                lambda root, r: head_loss(self._call_head, root, r.hidden, r.batch, total, self._tokens),
            )
        ]

    def scores(self, batches: Sequence[MicroBatch]) -> list[np.ndarray]:
        """Forward only: by micro-batch what `head_scores` says of each row."""
        return [
            np.array(scores)
            for scores in self._evaluated(
                batches, lambda root, r: head_scores(self._call_head, root, r.hidden, r.batch, self._tokens)
            )
        ]

    def _evaluated(
        self, batches: Sequence[MicroBatch], measure: Callable[[list[mx.array], _Running], mx.array]
    ) -> list[mx.array]:
        """`measure` of the head's tensors and each micro-batch that has passed all layers, without dropout."""
        (running,) = self._capture([batches])
        self._deck.train(False)
        self._forward(running, len(self._deck.layers), keep_inputs=False)
        self._deck.train(True)
        root = self._store.bind(0)
        found = [measure([root[i] for i in self._head_tensors], r) for r in running]
        self._store.release(len(self._deck.layers))
        self._store.release(0)
        return found

    # ---- 1. capture

    def _capture(self, rounds: Sequence[Sequence[MicroBatch]]) -> Rounds:
        self._store.gather(0)
        self._store.gather(1)
        self._store.bind(0)
        shapes: dict[tuple[int, ...], list[LayerArguments]] = {}
        running: Rounds = [[] for _ in rounds]
        for one, micro_batches in zip(running, rounds, strict=True):
            for micro in micro_batches:
                inputs, targets, mask = (mx.array(x) for x in (micro.inputs, micro.targets, micro.mask))
                hidden, arguments = self._deck.capture(inputs)
                if phases.poisoned("forward"):
                    hidden = hidden * mx.nan
                # They depend on the shape alone (checked before training): micro-batches of one shape share them.
                arguments = shapes.setdefault(tuple(inputs.shape), arguments)
                documents = None if micro.documents is None else mx.array(micro.documents)
                mx.eval(inputs, targets, mask, hidden, documents)
                kept: list[mx.array | None] = [None] * len(self._deck.layers)
                position = sum(map(len, running))
                one.append(_Running(position, (inputs, targets, mask), arguments, documents, hidden, kept))
        return running

    # ---- 2. forward

    def _forward(self, running: list[_Running], stop: int, *, keep_inputs: bool = True) -> None:
        layers = len(self._deck.layers)
        for i in range(stop):
            self._store.bind(i + 1)
            if i + 1 < layers:
                self._store.gather(i + 2)
            for r in running:
                output = self._layer(i, r.hidden, r)
                mx.eval(output)
                if keep_inputs and i >= self._first:
                    r.inputs[i] = r.hidden
                r.hidden = output
            if i + 1 < layers:  # the last layer stays: the backward begins with it
                self._store.release(i + 1)

    def _layer(self, index: int, hidden: mx.array, r: _Running) -> mx.array:
        layer, given = self._deck.layers[index], r.arguments[index]
        if r.documents is not None:
            given = separate(layer, given, r.documents)
        if self._noise is not None and layer.training:
            self._noise.seed(r.position, index)
        output = hidden_of(layer(hidden, *given.positional, **given.keywords))
        if not isinstance(output, mx.array):
            raise UserError(
                f"{self._deck.name}: layer {index} returns {type(output).__name__}, not one array; "
                "this architecture cannot be streamed"
            )
        return output

    # ---- 3. head and tail

    def _call_head(self, arrays: Sequence[mx.array], hidden: mx.array, tokens: mx.array) -> mx.array:
        """Logits with the head's tensors replaced by `arrays`; the others stay as they are bound."""
        bound = list(self._root)
        for position, array in zip(self._head_tensors, arrays, strict=True):
            bound[position] = array
        self._store.rebind(0, bound)
        return self._deck.head(tokens, hidden)

    @property
    def _root(self) -> list[mx.array]:
        return self._store.bound(0)

    def _head(self, running: Rounds, total: mx.array, sums: GradientStore) -> list[CellSum | None]:
        """Head and tail of every micro-batch; returns the head's sums by round, hands over the tail's."""
        layers = len(self._deck.layers)
        tail = list(range(self._cut, layers))
        for i in tail:
            self._store.gather(i + 1)
        weights = [self._store.bind(i + 1) for i in tail]
        heads = [self._root[i] for i in self._head_tensors]
        if self._cut > self._first:
            self._store.gather(self._cut if tail else layers)
        head_sums: list[CellSum | None] = []
        for round_index, one in enumerate(running):
            head_sum, tail_sums = CellSum(), [CellSum() for _ in tail]
            for r in one:
                gradients, tail_gradients = self._head_of(r, heads, weights, tail, total)
                head_sum.add(gradients)
                for cell, layer_gradients in zip(tail_sums, tail_gradients, strict=True):
                    cell.add(layer_gradients)
                del gradients, tail_gradients
                mx.eval(r.loss, r.hidden, head_sum.arrays, [c.arrays for c in tail_sums])
            head_sums.append(head_sum if one else None)
            for i, cell in zip(reversed(tail), reversed(tail_sums), strict=True):
                sums.deliver(i + 1, round_index, cell if one else None)
        self._store.rebind(0, self._root)
        for i in tail:
            self._store.release(i + 1)
        return head_sums

    def _head_of(
        self,
        r: _Running,
        heads: list[mx.array],
        weights: list[list[mx.array]],
        tail: list[int],
        total: mx.array,
    ) -> tuple[list[mx.array], list[list[mx.array]]]:
        """One micro-batch's loss and gradients by head and tail; `r.hidden` becomes the boundary's cotangent.

        With a tail the head's gradient by its input enters the differentiated sum as a constant, sum(y * dy), whose
        derivative by y is dy. All is lazy at first; then the head is evaluated chunk by chunk, the backward last.
        """
        if not tail:
            r.loss, gradients, r.hidden = head_gradients(
                self._call_head, heads, r.hidden, r.batch, total, self._tokens
            )
            return gradients, []

        def through_tail(tensors: list[list[mx.array]], hidden: mx.array) -> tuple[mx.array, ...]:
            for i, arrays in zip(tail, tensors, strict=True):
                self._store.rebind(i + 1, arrays)
                hidden = self._layer(i, hidden, r)
            constant = mx.stop_gradient(hidden)
            chunks = list(head_chunks(self._call_head, heads, constant, r.batch, total, self._tokens))
            cotangent = mx.stop_gradient(joined([part for _, _, part in chunks]))
            surrogate = (hidden * cotangent).sum()
            return (surrogate, *(array for loss, sums, part in chunks for array in (loss, *sums, part)))

        outputs, (tail_gradients, cotangent) = mx.value_and_grad(through_tail, argnums=(0, 1))(
            weights, r.hidden
        )
        for i, arrays in zip(tail, weights, strict=True):
            self._store.rebind(i + 1, arrays)
        chunks = list(outputs[1:])
        del outputs
        while chunks:
            (r.loss, *sums, part), chunks = chunks[: len(heads) + 2], chunks[len(heads) + 2 :]
            mx.eval(r.loss, sums, part)
        if tail[0] > self._lowest:
            r.hidden = cotangent
        return sums, list(tail_gradients)

    # ---- 4. backward

    def _backward(self, running: Rounds, sums: GradientStore) -> None:
        for i in reversed(range(self._first, self._cut)):
            weights = self._store.bind(i + 1)
            if i > self._first:
                self._store.gather(i)
            for round_index, one in enumerate(running):
                cell = CellSum()
                for r in one:
                    self._layer_gradients(i, r, weights, cell)
                sums.deliver(i + 1, round_index, cell if one else None)
                del cell
            del weights
            self._store.release(i + 1)

    def _layer_gradients(self, index: int, r: _Running, weights: list[mx.array], cell: CellSum) -> None:
        """One micro-batch's vjp of a layer: adds to `cell`, and the cotangent moves on to the layer's input."""

        def layer(*arrays: mx.array) -> mx.array:
            self._store.rebind(index + 1, arrays[:-1])
            return self._layer(index, arrays[-1], r)

        _, gradients = mx.vjp(layer, [*weights, r.take_input(index)], [r.hidden])
        self._store.rebind(index + 1, weights)
        if index != self._lowest:
            r.hidden = gradients[-1]
        cell.add(gradients[:-1])
        del gradients
        mx.eval(r.hidden, cell.arrays)

    # ---- 5. embed

    def _embed(self, running: Rounds, head_sums: list[CellSum | None], sums: GradientStore) -> None:
        root = self._root
        for round_index, (one, head_sum) in enumerate(zip(running, head_sums, strict=True)):
            embed_sum = CellSum()
            for r in one if self._embed_tensors else ():
                embed_sum.add(self._embed_gradients(r, root))
                mx.eval(embed_sum.arrays)
            cell = self._whole_root(root, head_sum, embed_sum) if head_sum is not None else None
            sums.deliver(0, round_index, cell)
        self._store.rebind(0, root)

    def _embed_gradients(self, r: _Running, root: list[mx.array]) -> list[mx.array]:
        def embed(*arrays: mx.array) -> mx.array:
            bound = list(root)
            for position, array in zip(self._embed_tensors, arrays, strict=True):
                bound[position] = array
            self._store.rebind(0, bound)
            return self._deck.embed(r.batch[0]).astype(mx.float32)

        # A frequent token's row is a sum over many positions: in fp32, or bfloat16 would swallow most of it. (The
        # wide copies of the tensors are never evaluated; the gradient does not need them.)
        wide = [root[i].astype(mx.float32) for i in self._embed_tensors]
        # On Metal a scatter-add uses atomics, in any order; the CPU's is sequential, so the sum is reproducible.
        with mx.stream(mx.cpu):
            _, gradients = mx.vjp(embed, wide, [r.hidden.astype(mx.float32)])
        return list(gradients)

    def _whole_root(self, root: list[mx.array], head: CellSum, embed: CellSum) -> CellSum:
        """Head and embedding sums of a cell, by the root's tensors; a tied matrix gets the sum of both."""
        by_position: dict[int, mx.array] = dict(zip(self._head_tensors, head.arrays, strict=True))
        for position, array in zip(self._embed_tensors, embed.arrays, strict=True):
            if position in by_position:
                array = by_position[position].astype(mx.float32) + array.astype(mx.float32)
            by_position[position] = array
        head.arrays, embed.arrays = [], []
        cell = CellSum()
        cell.arrays = [by_position.get(i, mx.zeros_like(tensor)) for i, tensor in enumerate(root)]
        by_position.clear()
        mx.eval(cell.arrays)
        return cell
