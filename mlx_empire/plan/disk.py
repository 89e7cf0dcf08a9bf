"""The disk ledger: what a run will have on each file system, by name and formula, held against what is free there.

Decides what must fit and what is only asked for. What must: two checkpoints at once, for the newest whole one stays
until the next is committed; later the newest one and the result; layers' inputs that go to files. What is asked for
besides: `run.keep_last` checkpoints and the one that is being written, copies of another machine's shards, the token
cache. A run with too little room for that loses nothing (`checkpoint.retention` gives up copies and old checkpoints,
`run.result` waits), so it is `tight`; where even the least does not fit the verdict is `no`.

File systems, not machines: two ranks of one machine share one, and so do machines with a shared disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlx_empire.disk import with_headroom
from mlx_empire.model.spec import BLOCK, ITEM_BYTES, ModelSpec, is_adapter
from mlx_empire.plan.optimizer_bytes import StateBytes
from mlx_empire.plan.shards import ShardPlan
from mlx_empire.recipe.duration import Duration
from mlx_empire.recipe.run_sections import RunSection
from mlx_empire.sizes import amount

PIECE_BYTES = (
    320  # what a shard's header and the manifest say of an array, beside its names: digest, shape, place
)
ADAPTER_FORMS = 2  # mlx-lm's and PEFT's, both in float32
AT_ONCE = 2  # the newest whole checkpoint, and the one that is being written

FORMULAS: Mapping[str, str] = {
    "checkpoint": "for each trained element of the shares here: its weight and the optimizer's state, as in memory",
    "copies": "the shards of the machine before in the ring (run.buddy), in every checkpoint",
    "at once": "run.keep_last and the one that is being written; without it all of the run, while there is room",
    "result": "final/: the model as it computes, with its towers and tokenizer; or adapters in float32, in two formats",
    "inputs": "layers' inputs of all ranks here (memory.activation_offload), from the first step to the last",
    "base": "the model's folder, where this machine does not see it yet",
    "token cache": "at most 2.5 bytes for each byte of the data (4 a token and 1 a target), written by the first start;"
    " with packing or data.validation_split beside as much again, before there is a checkpoint; with a teacher half as "
    "many times 6 x distillation.top + 2 besides, on each machine",
}


@dataclass(frozen=True)
class Keeping:
    """What the recipe asks of checkpoints: how many saves the run makes (0: none, None: not known), how many of them
    are kept (None: all), and whether machines keep copies of each other's shards.
    """

    saves: int | None
    keep_last: int | None
    copies: bool

    @classmethod
    def of(cls, run: RunSection, steps: int | None) -> Keeping:
        """By the recipe's section, for a run of so many steps (None: not known)."""
        return cls(_saves(run.save_every, steps), run.keep_last, run.buddy is not False)

    @property
    def asked(self) -> int:
        """Checkpoints that lie there at once where there is room; where nobody knows, those that must."""
        kept = self.keep_last + 1 if self.keep_last is not None else self.saves
        return self._no_more_than_saved(AT_ONCE if kept is None else kept)

    @property
    def least(self) -> int:
        """Checkpoints that must fit at once."""
        return self._no_more_than_saved(AT_ONCE)

    @property
    def at_the_end(self) -> int:
        """Checkpoints that lie beside the result where there is room."""
        return self._no_more_than_saved(self.asked if self.keep_last is None else self.keep_last)

    def _no_more_than_saved(self, count: int) -> int:
        return count if self.saves is None else min(count, self.saves)


@dataclass(frozen=True)
class Places:
    """Where files lie. By rank: `folders` names the checkpoint folder, `disks` its file system; ranks that share one
    have the same word. `result`, `base` and `tokens` are the file systems of what rank 0 writes. `names`: of a file
    system, for people; `free`: bytes that are free on it or can be, where that is known.
    """

    folders: tuple[str, ...]
    disks: tuple[str, ...]
    result: str
    base: str
    tokens: str
    names: Mapping[str, str]
    free: Mapping[str, int]


@dataclass(frozen=True)
class Beside:
    """Bytes that are no matter of the plan: `carried` into a full result (towers, tokenizer), the model's folder where
    it is still to come (`base`), the token cache (`tokens`), and what lies beside that while it is written, when no
    checkpoint is there yet (`building`).
    """

    carried: int = 0
    base: int = 0
    tokens: int = 0
    building: int = 0


@dataclass(frozen=True)
class DiskLedger:
    """Bytes on one file system. `checkpoint`: one of them, as ranks here write it; `copies`: others' shards in it;
    `inputs`: of layers, as long as the run lasts."""

    disk: str
    name: str
    checkpoint: int
    copies: int
    keeping: Keeping
    result: int
    base: int
    tokens: int
    free: int | None
    building: int = 0
    inputs: int = 0

    @property
    def asked(self) -> int:
        """What the recipe asks for, at the worst moment of the run."""
        each = self.checkpoint + self.copies
        saving, ending = self.keeping.asked * each, self.keeping.at_the_end * each + self.result
        running = max(saving, ending) + self.inputs
        return with_headroom(max(running, self.building) + self.base + self.tokens)

    @property
    def least(self) -> int:
        """What the run cannot do without."""
        saving = self.keeping.least * self.checkpoint
        ending = min(self.keeping.least, 1) * self.checkpoint + self.result
        return with_headroom(max(saving, ending) + self.base + self.inputs)

    @property
    def verdict(self) -> str | None:
        """`fits`, `tight` or `no`; None where nobody knows what is free."""
        if self.free is None:
            return None
        return "no" if self.least > self.free else "tight" if self.asked > self.free else "fits"

    @property
    def reason(self) -> str:
        """One sentence where the verdict is `tight` or `no`."""
        if self.free is None or self.verdict == "fits":
            return ""
        if self.verdict == "tight":
            short = (
                "copies and old checkpoints will go for room"
                if self.keeping.asked
                else "tokens are not cached"
            )
            return f"the disk of {self.name} has {amount(self.free)} free of {amount(self.asked)} asked for: {short}"
        parts = (
            [f"{self.keeping.least} x {amount(self.checkpoint)} of checkpoint"] if self.keeping.least else []
        )
        parts += [f"{amount(self.result)} of result"] if self.result else []
        parts += [f"{amount(self.base)} of base"] if self.base else []
        parts += [f"{amount(self.inputs)} of layers' inputs"] if self.inputs else []
        return (
            f"the disk of {self.name} needs {amount(self.least)} at least ({', '.join(parts)}) and has "
            f"{amount(self.free)} free"
        )


def disk_ledgers(
    spec: ModelSpec,
    plan: ShardPlan,
    keeping: Keeping,
    states: StateBytes,
    places: Places,
    beside: Beside,
    inputs: Sequence[int] = (),
) -> tuple[DiskLedger, ...]:
    """The ledger of every file system that the run writes to, in the order of the ranks; `inputs`: by rank, bytes of
    the file of layers' inputs."""
    shards = [shard_bytes(plan, rank, states) for rank in range(plan.world_size)]
    described = _described(plan, states)
    own, others, files = (dict.fromkeys(places.disks, 0) for _ in range(3))
    for disk, nbytes in zip(places.disks, inputs, strict=False):
        files[disk] += nbytes
    for rank, nbytes in enumerate(shards):
        own[places.disks[rank]] += nbytes
        keeper = keeper_of(rank, places.folders) if keeping.copies else None
        if keeper is not None:
            others[places.disks[keeper]] += nbytes
    for folder in dict.fromkeys(places.folders):  # each has a manifest of all shards
        own[places.disks[places.folders.index(folder)]] += described
    saved = keeping.saves != 0
    disks = dict.fromkeys(
        (*(places.disks if saved or any(inputs) else ()), places.result, places.base, places.tokens)
    )
    result = result_bytes(spec) + (0 if _has_adapters(spec) else beside.carried)
    found = [
        DiskLedger(
            disk,
            places.names[disk],
            own.get(disk, 0) if saved else 0,
            others.get(disk, 0) if saved else 0,
            keeping if saved and own.get(disk) else Keeping(0, None, False),
            result if disk == places.result else 0,
            beside.base if disk == places.base else 0,
            beside.tokens if disk == places.tokens else 0,
            places.free.get(disk),
            beside.building if disk == places.tokens else 0,
            files.get(disk, 0),
        )
        for disk in disks
    ]
    return tuple(one for one in found if one.asked > with_headroom(0))


def shard_bytes(plan: ShardPlan, rank: int, states: StateBytes) -> int:
    """Bytes of the arrays that `rank` saves: of what it owns, whatever it keeps besides at stages 0 to 2."""
    total = 0
    for unit in plan.units:
        for segment in unit.segments:
            if segment.kind != "frozen":
                a, b = segment.interval(rank)
                found = states(b - a, segment.dtype, quantised=segment.kind == "trainable")
                total += (b - a) * segment.itemsize + sum(size for _, size in found.items())
    return total


def result_bytes(spec: ModelSpec) -> int:
    """Bytes of the tensors of `final/`: all of them as they compute, or the adapters in both formats."""
    tensors = [tensor for unit in spec.units for tensor in unit.tensors]
    if _has_adapters(spec):
        return ADAPTER_FORMS * sum(4 * t.size for t in tensors if t.trainable)
    return sum(t.size * ITEM_BYTES[t.dtype] for t in tensors)


def _has_adapters(spec: ModelSpec) -> bool:
    return any(is_adapter(t.name) for unit in spec.units for t in unit.tensors)


def keeper_of(rank: int, folders: Sequence[object]) -> int | None:
    """The next rank with another checkpoint folder: it keeps a copy of this rank's shard. None where there is none."""
    size = len(folders)
    following = ((rank + k) % size for k in range(1, size))
    return next((r for r in following if folders[r] != folders[rank]), None)


def _described(plan: ShardPlan, states: StateBytes) -> int:
    """What headers and manifest say of all shards; a shard's header lies with the shard, the manifest everywhere."""
    total = 0
    for unit in plan.units:
        for segment in unit.segments:
            if segment.kind == "frozen":
                continue
            arrays = 1 + len(states(BLOCK, segment.dtype, quantised=segment.kind == "trainable"))
            for placement in segment.placements:
                start, stop = placement.start, placement.start + placement.tensor.padded_size
                edges = zip(segment.edges, segment.edges[1:], strict=False)
                owners = sum(max(a, start) < min(b, stop) for a, b in edges)
                total += owners * arrays * (PIECE_BYTES + 2 * len(placement.tensor.name))
    return total


def _saves(every: Duration | None, steps: int | None) -> int | None:
    """How many checkpoints a run of so many steps saves, that of its last step included; None where nobody knows."""
    if every is None:
        return 0
    if every.unit == "percent":
        count = math.ceil(100 / every.value)
    elif every.unit == "steps" and steps is not None:
        count = math.ceil(steps / every.value)
    else:
        return None
    return count if steps is None else min(count, steps)


def disk_verdict(ledgers: Sequence[DiskLedger]) -> str:
    """That of the worst file system of those that are known."""
    order = ("fits", "tight", "no")
    return max((one.verdict or "fits" for one in ledgers), key=order.index, default="fits")
