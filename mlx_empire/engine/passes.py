"""What is computed for one micro-batch: the pass through a layer, the loss, each one's vjp. The order is the step's.

Everything is evaluated between the calls of `mx.vjp`, outside any transformation, so memory is freed as it goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from mlx_empire.cluster.machine import computes_on_gpu
from mlx_empire.data.batches import MicroBatch
from mlx_empire.engine.gradients import EmbeddingSum, MicroBatchSum
from mlx_empire.engine.layer_calls import Call, LayerCalls, Running, differentiated
from mlx_empire.engine.loss import (
    Chunk,
    head_gradients,
    head_likeliest,
    head_loss,
    head_readings,
    head_scores,
    logit_chunks,
)
from mlx_empire.engine.store import ShardStore
from mlx_empire.engine.traces import Arrays
from mlx_empire.model.attention.patterns import cuts_of
from mlx_empire.model.attention.segments import Kernels
from mlx_empire.model.distillation import Distillation
from mlx_empire.model.head_loss import head_chunks, joined_chunks
from mlx_empire.model.kept import Kept, Noting, Reusing
from mlx_empire.model.layers import LayerArguments, LayerNoise, SlottedModel
from mlx_empire.model.ternary import in_full


class Passes:
    """The model's parts, as functions of a micro-batch and of the tensors that are bound.

    `head_tensors` and `embed_tensors` are positions among the root's trainable tensors that the head and the embedding
    depend on (a tied matrix stands in both); `tokens`: of a chunk of the loss; `noise` is there where layers have
    dropout; `table` is the position of the matrix in which tokens are looked up, where nothing else of the root goes by
    tokens. Layers are counted from 0. Without `kernels` every layer attends by the mask that it is given. `strict`: the
    forward of a training step runs as where it is differentiated (`differentiated`). Layers that are recomputed are
    traced where one `compiles`. `how` a teacher's values count, where micro-batches come with one.
    """

    def __init__(
        self,
        slotted: SlottedModel,
        store: ShardStore,
        head_tensors: Sequence[int],
        embed_tensors: Sequence[int],
        tokens: int,
        noise: LayerNoise | None = None,
        table: int | None = None,
        kernels: Kernels | None = None,
        *,
        strict: bool = True,
        compiles: bool = False,
        how: Distillation | None = None,
    ) -> None:
        self._slotted, self._store, self._tokens = slotted, store, tokens
        self._table, self._strict, self._how = table, strict, how
        self._calls = LayerCalls(slotted, store, noise, kernels, compiles=compiles)
        self.traces, self.strength = self._calls.traces, self._calls.strength
        self.head_tensors, self.embed_tensors = list(head_tensors), list(embed_tensors)
        self._shapes: dict[tuple[int, ...], list[LayerArguments]] = {}
        self._evaluating = False
        self.in_full = computes_on_gpu()
        self._adder = ThreadPoolExecutor(1, "embedding")
        self.beside: mx.Stream | mx.DeviceType = mx.cpu  # where the embedding's gradient is computed

    def begin(self) -> None:
        """A new step or evaluation: micro-batches of other shapes."""
        self._shapes = {}
        self.traces.begin()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """For an evaluation: without dropout, with ternary weights in full, and nothing is computed again."""
        self._slotted.train(False)
        self._evaluating = True
        try:
            with in_full(self.strength):
                yield
        finally:
            self._evaluating = False
            self._slotted.train(True)

    # ---- forward

    def capture(self, position: int, micro: MicroBatch) -> Running:
        """The input of layer 0, and what the model passes to its layers besides."""
        inputs, targets, mask = (mx.array(x) for x in (micro.inputs, micro.targets, micro.mask))
        hidden, arguments = self._slotted.capture(inputs)
        # They depend on the shape alone (checked before training): micro-batches of one shape share them.
        shape = tuple(inputs.shape)
        if shape not in self._shapes:
            self._shapes[shape] = self._calls.by_pattern.settled(hidden, arguments)
        documents = None if micro.documents is None else mx.array(micro.documents)
        cuts = () if micro.documents is None else cuts_of(micro.documents)
        self._store.evaluate(hidden, documents)
        running = Running(position, (inputs, targets, mask), self._shapes[shape], documents, cuts, hidden)
        running.teacher = micro.teacher
        return running

    def forward(self, layer: int, r: Running, *, keep_input: bool, products: Sequence[int] = ()) -> None:
        """Run a layer; its input is kept where the backward will come back to it, and of `products` the results."""
        strict = self._strict and not self._evaluating

        def run(call: Call, _: Arrays, given: Arrays) -> tuple[list[mx.array], list[int]]:
            noting = Noting(products)

            def through(hidden: mx.array) -> mx.array:
                return call(hidden, noting if products else None)

            output = differentiated(through, given[0], in_full=self.in_full) if strict else through(given[0])
            return [output, *noting.kept.arrays()], list(noting.kept.products)

        (output, *kept), numbers = self._calls.run(layer, r, ("forward", strict, *products), run, [r.hidden])
        if products:
            r.kept[layer] = Kept.of(numbers, kept)
        with self.traces.evaluated():
            self._store.evaluate(output, kept)
        if keep_input:
            r.inputs[layer] = r.hidden
        r.hidden = output

    # ---- head

    def loss(self, r: Running, total: mx.array) -> mx.array:
        """Forward only: each row's loss (rows,), divided by `total`."""
        return head_loss(self._logits(r), total)

    def scores(self, r: Running) -> mx.array:
        """Forward only: what `head_scores` says of each row, (rows, 2)."""
        return head_scores(self._logits(r))

    def readings(self, r: Running) -> mx.array:
        """Forward only: the log-probability of every target, (rows, width)."""
        return head_readings(self._logits(r))

    def likeliest(
        self, r: Running, columns: int, top: int, temperature: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Forward only: what `head_likeliest` says of the targets that count."""
        return head_likeliest(self._logits(r), columns, top, temperature)

    def head(
        self, r: Running, weights: Mapping[int, list[mx.array]], total: mx.array, *, onward: bool
    ) -> tuple[list[mx.array], dict[int, list[mx.array]]]:
        """Loss and gradients by head and un-recomputed layers, whose `weights` are given by layer, lazily.

        `r.hidden` becomes the cotangent of the first un-recomputed layer's input where a layer below trains (`onward`).
        With such layers the head's gradient by its input enters the differentiated sum as a constant, sum(y * dy),
        whose derivative by y is dy. All is lazy at first; then the head is evaluated chunk by chunk, the backward last.
        """
        heads, layers = self._heads(), sorted(weights)
        if not layers:
            r.loss, gradients, r.hidden = head_gradients(
                self._call_head, heads, r.hidden, r.learnt, total, self._tokens, self._how
            )
            return gradients, {}

        def through_layers(tensors: list[list[mx.array]], hidden: mx.array) -> tuple[mx.array, ...]:
            for i, arrays in zip(layers, tensors, strict=True):
                self._store.rebind(i + 1, arrays)
                hidden = self._calls.untraced(i, r, hidden)
            constant = mx.stop_gradient(hidden)
            given = constant, r.learnt, total, self._tokens, self._how
            chunks = list(head_chunks(self._call_head, heads, *given))
            cotangent = mx.stop_gradient(joined_chunks([part for _, _, part in chunks]))
            surrogate = (hidden * cotangent).sum()
            return (surrogate, *(array for loss, sums, part in chunks for array in (loss, *sums, part)))

        outputs, (gradients, cotangent) = mx.value_and_grad(through_layers, argnums=(0, 1))(
            [weights[i] for i in layers], r.hidden
        )
        for i in layers:
            self._store.rebind(i + 1, weights[i])
        chunks = list(outputs[1:])
        del outputs
        while chunks:
            (r.loss, *sums, part), chunks = chunks[: len(heads) + 2], chunks[len(heads) + 2 :]
            mx.eval(r.loss, sums, part)
        if onward:
            r.hidden = cotangent
        return sums, dict(zip(layers, gradients, strict=True))

    def _logits(self, r: Running) -> Iterator[Chunk]:
        return logit_chunks(self._call_head, self._heads(), r.hidden, r.batch, self._tokens)

    def _heads(self) -> list[mx.array]:
        root = self._store.bound(0)
        return [root[i] for i in self.head_tensors]

    def _call_head(self, arrays: Sequence[mx.array], hidden: mx.array, tokens: mx.array) -> mx.array:
        """Logits with the head's tensors replaced by `arrays`; the others stay as they are bound."""
        bound = list(self._store.bound(0))
        for position, array in zip(self.head_tensors, arrays, strict=True):
            bound[position] = array
        self._store.rebind(0, bound)
        return self._slotted.head(tokens, hidden)

    # ---- backward

    def backward(self, layer: int, r: Running, weights: list[mx.array], *, onward: bool) -> list[mx.array]:
        """The layer's vjp, lazily: gradients by its weights; `r.hidden` becomes its input's cotangent (`onward`).

        What was kept of the layer is not computed again.
        """
        kept = r.kept.pop(layer, Kept())
        numbers, some = list(kept.products), bool(kept.arrays())

        def run(call: Call, weights: Arrays, given: Arrays) -> tuple[list[mx.array], None]:
            hidden, cotangent, *arrays = given

            def through(*given: mx.array) -> mx.array:
                self._store.rebind(layer + 1, given[:-1])
                return call(given[-1], Reusing(Kept.of(numbers, arrays)) if some else None)

            return mx.vjp(through, [*weights, hidden], [cotangent])[1], None

        arrays = [r.inputs.pop(layer), r.hidden, *kept.arrays()]
        gradients, _ = self._calls.run(layer, r, ("backward", some, *numbers), run, arrays)
        if onward:
            r.hidden = gradients[-1]
        return list(gradients[:-1])

    # ---- embed

    def embed(self, r: Running, cell: EmbeddingSum) -> None:
        """Hand over to `cell` the fp32 gradients by the embedding's tensors, from the cotangent of layer 0's input.

        Of the table in which tokens are looked up only the rows that were looked up take part: the embedding runs on
        those, with tokens counted anew. Nobody waits for it here: the CPU does it while the GPU goes on.
        """
        root, tokens = self._store.bound(0), r.batch[0]
        given = {i: root[i] for i in self.embed_tensors}
        if self._table is not None:
            rows, places = np.unique(np.array(tokens), return_inverse=True)
            tokens = mx.array(places.reshape(tokens.shape).astype(np.int32))
            given[self._table] = root[self._table][mx.array(rows)]

        def run(*arrays: mx.array) -> mx.array:
            bound = list(root)
            for position, array in zip(given, arrays, strict=True):
                bound[position] = array
            self._store.rebind(0, bound)
            return self._slotted.embed(tokens).astype(mx.float32)

        # On Metal a scatter-add uses atomics, in any order; the CPU's is sequential, so the sum is reproducible. What
        # the CPU does is evaluated by itself: the GPU must not wait for it within one evaluation.
        with mx.stream(self.beside):
            # A frequent token's row is a sum over many positions: in fp32, or bfloat16 would swallow most of it.
            wide = [array.astype(mx.float32) for array in given.values()]
            _, gradients = mx.vjp(run, wide, [r.hidden.astype(mx.float32)])
            by_position = dict(zip(given, gradients, strict=True))
            looked_up = None if self._table is None else by_position.pop(self._table)
            cell.dense.add(list(by_position.values()))
            mx.async_eval(looked_up, cell.dense.arrays)  # type: ignore[no-untyped-call]
        if looked_up is not None:
            cell.add_rows(self._adder, rows, looked_up)

    def whole_root(self, head: MicroBatchSum, embed: EmbeddingSum) -> MicroBatchSum:
        """Head and embedding sums of a cell, by the root's tensors, lazily; a tied matrix gets the sum of both. Waits
        for the embedding's."""
        embed.settle()
        root = self._store.bound(0)
        by_position: dict[int, mx.array] = dict(zip(self.head_tensors, head.arrays, strict=True))
        head.arrays = []
        dense = iter(embed.dense.arrays)
        for position in self.embed_tensors:
            held = by_position.pop(position, None)
            if position == self._table:
                table = root[position]
                array = (
                    embed.rows.whole(table.shape[0], table.dtype)
                    if held is None
                    else embed.rows.added_to(held)
                )
            else:
                array = next(dense)
                array = array if held is None else held.astype(mx.float32) + array.astype(mx.float32)
            del held
            by_position[position] = array
        cell = MicroBatchSum()
        cell.arrays = [by_position.get(i, mx.zeros_like(tensor)) for i, tensor in enumerate(root)]
        return cell
