"""What head and embedding need in a step, in bytes: logits, gradients and their sums.

The head goes over a micro-batch in chunks of positions (`workload.chunk_tokens`). The embedding has a gradient for the
rows that tokens look up alone, where nothing but a trained table is looked up.
"""

from __future__ import annotations

from functools import cached_property

from mlx_empire.model.closed_forms import looked_up, root_parts, root_use
from mlx_empire.model.spec import ITEM_BYTES, ModelSpec, TensorSpec
from mlx_empire.plan.workload import Workload, chunk_tokens

# Where the head cannot be traced:
LOGITS_COPIES = 3.2  # fp32 arrays of a chunk's logits alive in the gradient of the loss
SOFT_CAPPED = 2.2  # more of them where logits are soft-capped
TAUGHT = 4.0  # and where a teacher's values count, as where the head can be traced


class RootMemory:
    """The root's numbers. `contribution`: bytes of its gradients on the wire; `wide`: how much longer fp32 is.

    A cell of several micro-batches adds their gradients up in fp32.
    """

    def __init__(self, spec: ModelSpec, work: Workload, contribution: int = 0) -> None:
        self._spec, self._work, self._contribution = spec, work, contribution
        self._adds_up = work.layout.micro_batches > work.layout.cells
        self._item = ITEM_BYTES[spec.dtype]
        self.wide = 4 // self._item

    @cached_property
    def _vocabulary(self) -> int:
        return int(self._spec.text_config.get("vocab_size") or 0)

    @cached_property
    def _chunk_tokens(self) -> int:
        return chunk_tokens(self._vocabulary, frozen=self._spec.frozen_root)

    @cached_property
    def chunked(self) -> bool:
        """Whether a micro-batch takes more than one chunk."""
        return self._work.tokens > self._chunk_tokens

    @cached_property
    def fitted_logits(self) -> int:
        """In fewer bits than fp32 the head's own logits and their gradient lie beside the wide ones."""
        elements = min(self._chunk_tokens, self._work.tokens) * self._vocabulary
        size = elements * (4 * LOGITS_COPIES + 2.25 * self._item * (self._item < 4))
        soft = self._spec.family == "gemma2" or self._spec.text_config.get("final_logit_softcapping")
        taught = TAUGHT if self._work.distillation is not None else 0
        return int(size + 4 * elements * ((SOFT_CAPPED if soft else 0) + taught))

    @cached_property
    def head(self) -> int:
        """The trained tensors that the head uses."""
        return root_use(self._spec)[0] * self._item

    @cached_property
    def embed(self) -> int:
        """The trained tensors that the embedding uses."""
        return root_use(self._spec)[1] * self._item

    @cached_property
    def _table(self) -> TensorSpec | None:
        return looked_up(self._spec)

    @cached_property
    def by_row(self) -> bool:
        """Whether the embedding's gradient is that of the rows that are looked up; adapters' is whole."""
        return self._table is not None

    @cached_property
    def _whole(self) -> list[TensorSpec]:
        """What of the embedding has a whole gradient."""
        return [t for t in root_parts(self._spec)[1] if t is not self._table]

    def embedding_sum(self, micro_batches: int) -> int:
        """The sum of the embedding's gradients of so many micro-batches of a cell, in fp32: of a table the rows that
        they look up at most, other tensors whole."""
        return self._rows(micro_batches) + 4 * sum(t.size for t in self._whole)

    def embedding_beside(self, hidden: int) -> int:
        """What one micro-batch's gradients of the embedding need beside that sum: the tensors in fp32, where they are
        not, their gradients, where they are no sum yet, and the cotangent of so many bytes in fp32."""
        whole = sum(4 * t.size * ((ITEM_BYTES[t.dtype] < 4) + self._adds_up) for t in self._whole)
        return 2 * self._rows(1) + whole + (hidden if self.embed else 0)

    def _rows(self, micro_batches: int) -> int:
        if self._table is None:
            return 0
        rows, columns = self._table.shape
        return 4 * columns * min(micro_batches * self._work.tokens, rows)

    def joined(self, micro_batches: int) -> int:
        """What there is besides when head's and embedding's sums of a cell are put together: a tied matrix in fp32, and
        in the order of rows before, or the whole contribution."""
        tied = self._tied
        in_rows = self._item * tied if self._is_narrow(micro_batches) else 0
        wide = self.wide if self._adds_up and not self.by_row else 1
        return max(4 * tied + in_rows, wide * self._contribution)

    def copied(self, largest: int) -> int:
        """What is made flat of the root's sums at once, where the `largest` has so many bytes."""
        return min(largest, self._contribution - self.flat) if self.flat else largest

    @cached_property
    def flat(self) -> int:
        """Bytes of a tied matrix in fp32: it is flat when both sums are together in it, and is not copied again."""
        return self._tied * self._item if self.by_row and self._item == 4 else 0

    @cached_property
    def joins_first(self) -> bool:
        """Whether the joined sum is larger than what it takes the place of, or takes its place: a tied matrix's."""
        return bool(self.flat or (self._tied and self._item < 4))

    def widened(self, micro_batches: int) -> int:
        """How much longer the sums of a cell are when they are put together: a tied matrix is in fp32 from there on."""
        return self._tied * (4 - self._item) if self._is_narrow(micro_batches) else 0

    def added(self, place: int) -> int:
        """What adding the head's gradients of a cell's micro-batch number `place` needs beside its sum so far, once
        these are there and the logits have gone. In fp32 a sum lies where one of the two lay; narrower ones are made
        wide first, the sum of a cell's first as well, and stay until that is done."""
        if place == 0 or self._item == 4 or self.chunked:
            return 0
        return self.head * (1 + self.wide * (2 if place == 1 else 1))

    def _is_narrow(self, micro_batches: int) -> bool:
        return self._item < 4 and micro_batches == 1 and not self.chunked

    @cached_property
    def _tied(self) -> int:
        """Elements that head and embedding share."""
        return max((self.head + self.embed - self._contribution) // self._item, 0)

    def head_sum(self, micro_batches: int) -> int:
        """The sum of the head's gradients of so many micro-batches of a cell."""
        return self.head * (self.wide if micro_batches > 1 or self.chunked else 1)
