"""A step on lanes, against schedules written out by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.planning import catalog_spec, llama_like, recipe_of

from mlx_empire.plan.actions import Action
from mlx_empire.plan.schedule import training_step
from mlx_empire.plan.shards import make_plan
from mlx_empire.plan.step_time import COMPUTE, DISK, EXCHANGE, WAIT, Link, RankLanes, _Wires, step_timeline
from mlx_empire.plan.step_traffic import step_matrices
from mlx_empire.plan.traffic import PIECE_BYTES
from mlx_empire.plan.workload import Workload, cell_layout

SPEC = llama_like(layers=3, dtype="float32")
ROOT, LAYER = (4 * unit.parameters for unit in SPEC.units[:2])  # bytes
RATE = float(LAYER)  # a layer passes a card in one second


@dataclass(frozen=True)
class Fixed:
    """Seconds by kind of action."""

    seconds: dict[str, float]
    adding: float = 0.0

    def compute(self, action: Action) -> float:
        return action.times * self.seconds.get(action.kind, 0.0)

    def add(self, nbytes: int) -> float:
        return self.adding * nbytes

    def disk(self, action: Action) -> float:
        return action.times * self.seconds.get(action.kind, 0.0)


def work_of(
    ranks: int, micro_batches: int = 2, cells: int | str = "auto", tail: int = 0, *, offload: bool = False
) -> Workload:
    layout = cell_layout(micro_batches, 1, cells, ranks)
    return Workload(1, 64, layout, tail, "float32", "auto", 1 << 20, offload=offload)


def timed(shares, stage, costs, rate=RATE, per="card", **more):
    plan = make_plan(SPEC.units, shares, stage)
    link, work = Link(rate, per), work_of(len(shares), **more)
    return step_timeline(plan, work, [costs] * len(shares), link, "direct")


def test_alone_a_step_is_its_computation():
    costs = Fixed({"forward": 1.0, "head": 2.0, "backward": 3.0, "embed": 0.5, "update": 0.25})
    for stage in range(4):
        timeline = timed([1], stage, costs, micro_batches=4)
        assert timeline.seconds == pytest.approx(4 * (3 * 1 + 2 + 3 * 3 + 0.5) + 4 * 0.25)
        assert timeline.busy(0, WAIT) == timeline.busy(0, EXCHANGE) == 0


def test_without_computation_a_step_is_its_exchanges_one_after_the_other():
    """Two equal ranks at stage 3: half of the root, five gathers of layers and four reductions pass each card."""
    timeline = timed([1, 1], 3, Fixed({}))
    root = ROOT / LAYER
    assert timeline.seconds == pytest.approx((2 * root + 5 + 3) / 2, rel=1e-3)


def test_a_gather_hides_behind_the_layer_before_and_a_reduction_behind_the_next():
    """By hand, with half a second an exchange of a layer: root and layer 1 are waited for, and the last reductions."""
    costs = Fixed({"forward": 10.0, "backward": 10.0, "head": 10.0, "embed": 10.0})
    timeline = timed([1, 1], 3, costs)
    half_root = ROOT / LAYER / 2
    exposed = half_root + 0.5 + 0.5 + half_root  # in front: root, layer 1; behind: the reductions of both
    assert timeline.seconds == pytest.approx(8 * 10 + exposed, rel=1e-3)


def test_forward_cannot_hide_what_belongs_to_the_backward():
    """All traffic together is below all computation, and the step is longer than both: the queue is one, in order."""
    costs = Fixed({"forward": 0.1, "backward": 3.0})
    timeline = timed([1, 1], 3, costs, rate=RATE / 2)
    compute = 3 * 0.1 + 3 * 3.0
    assert timeline.busy(0, EXCHANGE) < compute
    assert timeline.seconds > compute + 2.0  # forward waits for three layers of one second each


@pytest.mark.parametrize(("ranks", "route", "hops"), [(2, "direct", 1), (3, "direct", 1), (3, "relay", 2)])
def test_every_exchange_and_the_norm_s_two_messages_cost_the_wire_s_latency(ranks, route, hops):
    """Stage 3 without computation: six gathers and four reductions, segment by segment, and one norm."""
    plan = make_plan(SPEC.units, [1] * ranks, 3)
    work = work_of(ranks, micro_batches=ranks)
    quick, slow = (
        step_timeline(plan, work, [Fixed({})] * ranks, Link(1e12, latency=late), route) for late in (0.0, 0.5)
    )
    root, *layers = [len(unit.segments) for unit in plan.units]
    gathers, reductions = root + 2 * sum(layers) - layers[-1], root + sum(layers)
    assert slow.seconds - quick.seconds == pytest.approx(0.5 * (hops * gathers + reductions + 2), rel=1e-3)


@given(st.lists(st.integers(0, 30), min_size=3, max_size=5).filter(any), st.floats(0.0, 0.5))
@example([1, 0, 0, 0, 0], 0.5)
@settings(max_examples=60)
def test_a_relay_takes_as_long_as_its_pieces_one_by_one(sizes, latency):
    """Against every piece's own way from rank to rank; a piece takes a second, an interval whole pieces."""
    size, total = len(sizes), sum(sizes)
    sent = np.zeros((size, size))
    for r in range(size):
        sent[r][(r + 1) % size] = PIECE_BYTES * (total - sizes[(r + 1) % size])
    free, done = [0.0] * size, [0.0] * size
    here = [[0.0] * sizes[r] for r in range(size)]  # when the pieces came that a rank sends next
    for _ in range(size - 1):
        came = []
        for r in range(size):
            came.append([])
            for piece in here[r]:
                free[r] = max(free[r], piece) + 1.0
                came[r].append(free[r] + latency)
        here = [came[r - 1] for r in range(size)]
        done = [max([done[r], free[r], *here[r]]) for r in range(size)]
    plan = make_plan(SPEC.units, [1] * size, 3)
    wires = _Wires(plan, work_of(size), [Fixed({})] * size, Link(PIECE_BYTES, latency=latency), "relay")
    assert wires._round_the_ring(sent, [0.0] * size) == pytest.approx(done)


def test_the_hub_of_a_reduction_holds_up_everybody():
    """Shares 2:1:1: the first rank receives half of a layer from each of two ranks, a whole layer past its card."""
    plan = make_plan(SPEC.units, [2, 1, 1], 2)
    timeline = step_timeline(plan, work_of(3, micro_batches=3), [Fixed({})] * 3, Link(RATE))
    reductions = [e for e in timeline.events if e.lane == EXCHANGE and e.what == "reduce" and e.unit == 3]
    assert len(reductions) == 3
    assert all(e.end - e.start == pytest.approx(1.0, rel=1e-2) for e in reductions)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_contributions_are_added_as_they_come_and_before_the_next_exchange(ranks):
    """Every rank adds all contributions to its own interval, its own too: together a whole unit for each. It begins
    when a first piece has come from the others, and alone at once."""
    quick, slow = (
        timed([1] * ranks, 2, Fixed({}, adding), micro_batches=ranks) for adding in (0.0, 1 / RATE)
    )
    wire = (ranks - 1) / ranks  # of a unit passes a card in each direction

    def longer(unit: int) -> float:
        pieces = math.ceil(unit / ranks / PIECE_BYTES)
        return (wire / pieces + 1 - wire) * unit / LAYER

    assert slow.seconds - quick.seconds == pytest.approx(longer(ROOT) + 3 * longer(LAYER), rel=1e-2)


def test_the_last_piece_is_added_when_it_has_come():
    """Adding takes a tenth of the wire's time."""
    quick, slow = (timed([1, 1], 2, Fixed({}, adding), micro_batches=2) for adding in (0.0, 0.05 / RATE))
    pieces = math.ceil(LAYER / 2 / PIECE_BYTES)
    assert 0.05 * 3 / pieces < slow.seconds - quick.seconds < 0.05 * 4 / pieces + 0.05 * ROOT / LAYER


@pytest.mark.parametrize("ranks", [3, 6])
def test_segments_take_their_own_ways(ranks):
    """A frozen base goes directly where it can be cut equally, small adapters beside it go round the ring: no step
    is shorter than the busiest card needs."""
    recipe = recipe_of("tuning.type=lora", f"batch.global_size={ranks}")
    spec = catalog_spec("llama-3.2-3b", recipe)
    plan = make_plan(spec.units, [1] * ranks, 3)
    found = step_timeline(plan, work_of(ranks, micro_batches=ranks), [Fixed({})] * ranks, Link(1e9))
    assert found.seconds >= found.wire_seconds


@given(st.integers(1, 3), st.integers(0, 3), st.integers(4, 40), st.integers(0, 3))
@settings(max_examples=30)
def test_folded_micro_batches_take_as_long(ranks, stage, micro_batches, tail):
    """The clock folds them; written out one by one the step is the same."""
    plan = make_plan(SPEC.units, list(range(1, ranks + 1)), stage)
    work = work_of(ranks, micro_batches=micro_batches * ranks, tail=tail)
    costs = Fixed({"forward": 0.1, "head": 0.3, "backward": 0.3, "embed": 0.1, "update": 0.05})
    link = Link(RATE)
    folded = step_timeline(plan, work, [costs] * ranks, link)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_empire.plan.step_time.training_step", lambda shape, fold: training_step(shape))
        plain = step_timeline(plan, work, [costs] * ranks, link)
    assert folded.seconds == pytest.approx(plain.seconds)


def test_what_is_written_and_read_hides_behind_computation_but_for_the_first_read():
    """By hand: 3 layers, 4 micro-batches; a forward takes 1 s, a backward 3 s."""
    compute = {"forward": 1.0, "backward": 3.0}
    quick = timed([1], 2, Fixed({**compute, "offload": 0.5, "prefetch": 2.0}), micro_batches=4, offload=True)
    assert quick.seconds == pytest.approx(12 * 1.0 + 2.0 + 12 * 3.0)
    assert quick.busy(0, DISK) == pytest.approx(12 * 0.5 + 12 * 2.0)
    assert quick.busy(0, WAIT) == pytest.approx(2.0)


def test_a_slow_disk_sets_the_pace():
    compute = {"forward": 1.0, "backward": 3.0}
    slow = timed([1], 2, Fixed({**compute, "offload": 5.0, "prefetch": 7.0}), micro_batches=4, offload=True)
    assert slow.seconds == pytest.approx(12 * 5.0 + 12 * 7.0 + 3.0)  # behind the last read its backward


@given(st.integers(1, 3), st.integers(0, 3), st.integers(1, 40), st.integers(0, 3), st.floats(0.0, 1.0))
@settings(max_examples=30)
def test_folded_writes_and_reads_take_as_long(ranks, stage, micro_batches, tail, slow):
    plan = make_plan(SPEC.units, list(range(1, ranks + 1)), stage)
    work = work_of(ranks, micro_batches=micro_batches * ranks, tail=tail, offload=True)
    costs = Fixed({"forward": 0.1, "head": 0.3, "backward": 0.3, "offload": slow, "prefetch": slow})
    folded = step_timeline(plan, work, [costs] * ranks, Link(RATE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_empire.plan.step_time.training_step", lambda shape, fold: training_step(shape))
        plain = step_timeline(plan, work, [costs] * ranks, Link(RATE))
    assert folded.seconds == pytest.approx(plain.seconds)
    assert folded.busy(0, DISK) == pytest.approx(plain.busy(0, DISK))


def test_a_cable_for_each_pair_is_quicker_than_one_card():
    card, pair = (timed([1, 1, 1], 3, Fixed({}), per=per, micro_batches=3) for per in ("card", "pair"))
    assert pair.seconds == pytest.approx(card.seconds / 2, rel=1e-2)


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(0, 3),
    st.floats(0.01, 10.0),
)
@settings(max_examples=40)
def test_a_step_is_no_shorter_than_any_lane_and_no_longer_than_all_in_a_row(
    shares, stage, times, tail, speed
):
    costs = Fixed({"forward": 0.1, "head": 0.3, "backward": 0.3, "embed": 0.1, "update": 0.05})
    more = {"micro_batches": times * len(shares), "tail": tail}
    timeline = timed(shares, stage, costs, rate=RATE * speed, **more)
    ranks = range(len(shares))
    lanes = [timeline.busy(r, lane) for r in ranks for lane in (COMPUTE, EXCHANGE)]
    assert timeline.seconds >= max(lanes) - 1e-9
    assert timeline.seconds <= max(timeline.busy(r, COMPUTE) for r in ranks) + sum(lanes) + 1e-9
    for r in ranks:  # the main thread works or waits, from the first to its last action
        own = sorted((e.start, e.end) for e in timeline.events if e.rank == r and e.lane != EXCHANGE)
        assert all(a[1] == pytest.approx(b[0]) for a, b in pairwise(own))
    plan, work = make_plan(SPEC.units, shares, stage), work_of(len(shares), **more)
    bytes_sent = sum(map(sum, (row for matrix in step_matrices(plan, work) for row in matrix)))
    assert (bytes_sent == 0) == (timeline.busy(0, EXCHANGE) == 0)
    faster = timed(shares, stage, costs, rate=2 * RATE * speed, **more)
    assert faster.seconds <= timeline.seconds + 1e-9


class StageLanes(RankLanes):
    """Lanes for a schedule in which hidden states travel: `receive` waits for what another rank's `send` began."""

    def __init__(self, rank, actions, costs, sent):
        super().__init__(rank, actions, costs)
        self._sent = sent  # by micro-batch and crossing: when it is there, shared by all ranks

    def send(self, action: Action) -> None:
        self._sent[action.micro, action.round] = self.now + 1.0  # a message takes a second

    def receive(self, action: Action) -> None:
        self._until(WAIT, action, self._sent[action.micro, action.round])


def test_a_schedule_of_stages_fits_the_clock():
    """Breadth first by hand: 2 layers on 2 ranks, 3 micro-batches of 2 s each, messages of 1 s: 6 + 1 + 2 s."""
    sent: dict[tuple[int, int], float] = {}
    costs = Fixed({"forward": 2.0})
    first = [a for m in range(3) for a in (Action("forward", 1, m), Action("send", 1, m, 0))]
    second = [a for m in range(3) for a in (Action("receive", 0, m, 0), Action("forward", 2, m))]
    ranks = [StageLanes(r, actions, costs, sent) for r, actions in enumerate((first, second))]
    for rank in ranks:
        rank.advance()
    assert [rank.now for rank in ranks] == [6.0, 9.0]


def test_an_action_that_the_clock_does_not_know_fails_loudly():
    with pytest.raises(NotImplementedError, match=r"RankLanes.*'teleport'"):
        RankLanes(0, [Action("teleport")], Fixed({})).advance()


def test_shares_do_not_change_the_computation():
    plan = make_plan(SPEC.units, [3, 1], 3)
    costs = Fixed({"forward": 0.5, "backward": 1.5})
    equal = replace(plan, shares=(0.5, 0.5))
    for one in (plan, equal):
        timeline = step_timeline(one, work_of(2), [costs] * 2, Link(RATE))
        assert timeline.busy(0, COMPUTE) == pytest.approx(3 * 2.0)
