"""Gathers and reductions in a simulated world: any intervals, any order of completion that MPI allows."""

from collections.abc import Callable
from concurrent.futures import Future
from itertools import pairwise
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_empire.comm.buffers import Adder
from mlx_empire.comm.messages import (
    UNASKED,
    ReduceScatter,
    Staging,
    Stream,
    cut_into_buckets,
    direct_streams,
    relay_streams,
)
from mlx_empire.plan.traffic import all_gather_bytes, staging_bytes

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=5)


def edges_of(sizes: list[int]) -> list[int]:
    return [sum(sizes[:rank]) for rank in range(len(sizes) + 1)]


class AddsLater(Adder):
    """Adds beside the exchange, when the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[tuple[Future[None], Callable[[], None]]] = []

    def begin(self, total, contributions, wire, *, fresh=False) -> list[Future[None]]:
        future: Future[None] = Future()
        self.begun.append((future, lambda: self.add(total, contributions, wire, fresh=fresh)))
        return [future]

    def do(self, random: Random) -> None:
        """One of what has begun."""
        future, work = self.begun.pop(random.randrange(len(self.begun)))
        work()
        future.set_result(None)


def deliver(
    world: list[list[Stream]], random: Random, beside: Callable[[], bool] = lambda: False
) -> list[list[int]]:
    """Run every rank's streams: post what may be posted, complete one posted pair after another at random; the senders
    learn at random what the receivers wait for. `beside`: goes on with what else is under way, if anything is.

    Sends are read at completion, not at posting, so a buffer that is reused too early is seen.
    Returns elements moved, [source][destination].
    """
    moved = [[0] * len(world) for _ in world]
    posted: dict[tuple[int, int, bool, int], tuple[Stream, np.ndarray]] = {}
    ends = {
        (rank, stream.peer, stream.sends): stream for rank, streams in enumerate(world) for stream in streams
    }
    links = [(stream, ends[to, rank, False]) for (rank, to, sends), stream in ends.items() if sends]
    while True:
        working = beside()
        for rank, streams in enumerate(world):
            for stream in streams:
                while stream.may_post:
                    index = stream.posted
                    if stream.sends:
                        awaited = max(UNASKED, ends[stream.peer, rank, False].posted)
                        assert index < awaited, "sent to a rank that has no room for it"
                    pair = (rank, stream.peer) if stream.sends else (stream.peer, rank)
                    posted[(*pair, stream.sends, index)] = stream, stream.message(index)
                    stream.posted += 1
        behind = [(sender, receiver) for sender, receiver in links if receiver.posted > sender.granted]
        for sender, receiver in random.sample(behind, random.randint(min(1, len(behind)), len(behind))):
            sender.granted = receiver.posted
        pairs = [key for key in posted if key[2] and (key[0], key[1], False, key[3]) in posted]
        if not pairs and (behind or working):
            continue
        if not pairs:
            assert not posted, "a message was sent or expected, but not both"
            return moved
        source, destination, _, index = random.choice(sorted(pairs))
        sender, sent = posted.pop((source, destination, True, index))
        receiver, received = posted.pop((source, destination, False, index))
        assert sent.shape == received.shape
        received[:] = sent
        moved[source][destination] += sent.size
        for stream in random.sample([sender, receiver], 2):
            stream.complete(index)


@settings(deadline=None)
@given(SIZES, st.integers(1, 30), st.sampled_from(["direct", "relay"]), st.randoms(use_true_random=False))
def test_gathers_are_whole_and_as_large_as_planned(sizes, bucket_bytes, route, random) -> None:
    edges = edges_of(sizes)
    whole = np.arange(edges[-1], dtype=np.uint16)
    buckets = [cut_into_buckets(low, high, 2, bucket_bytes) for low, high in pairwise(edges)]
    streams = direct_streams if route == "direct" else relay_streams
    buffers, world = [], []
    for rank, (low, high) in enumerate(pairwise(edges)):
        buffer = np.full_like(whole, 65535)
        buffer[low:high] = whole[low:high]
        buffers.append(buffer)
        world.append(streams(buffer, buckets, rank))
    moved = deliver(world, random)
    assert all((buffer == whole).all() for buffer in buffers)
    assert moved == all_gather_bytes(edges, 1, route)


@settings(deadline=None)
@given(SIZES, st.integers(1, 30), st.booleans(), st.randoms(use_true_random=False), st.data())
def test_reductions_add_in_rank_order_whatever_comes_first(sizes, bucket_bytes, later, random, data) -> None:
    """Also where buckets are added later than they have come, in any order."""
    edges, ranks = edges_of(sizes), range(len(sizes))
    contributes = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    numbers = np.random.default_rng(random.randrange(2**32))
    totals = [numbers.standard_normal(size).astype(np.float32) for size in sizes]
    expected = np.concatenate(totals)
    adder = AddsLater() if later else Adder()
    reductions = []
    for rank in ranks:
        dense = (numbers.standard_normal(edges[-1]) * 10.0 ** numbers.integers(-4, 5, edges[-1])).astype(
            np.float32
        )
        middle = sorted(random.choices(range(edges[-1] + 1), k=2))
        dense[middle[0] : middle[1]] = 0
        pieces = [(0, dense[: middle[0]].copy()), (middle[1], dense[middle[1] :].copy())]
        if contributes[rank]:
            expected += dense
        pieces = [piece for piece in pieces if piece[1].size]
        reductions.append(
            ReduceScatter(
                rank, pieces, edges, totals[rank], contributes, "float32", bucket_bytes, Staging(), adder
            )
        )

    def beside() -> bool:
        if isinstance(adder, AddsLater) and adder.begun and random.random() < 0.5:
            adder.do(random)
        return any([reduction.add_arrived() for reduction in reductions])

    moved = deliver([reduction.streams() for reduction in reductions], random, beside)
    for reduction in reductions:
        reduction.finish()
        assert reduction.staging.nbytes <= staging_bytes(edges, 4, reduction.rank, bucket_bytes)
    assert np.concatenate(totals).tobytes() == expected.tobytes()
    assert moved == [[contributes[a] * sizes[b] if a != b else 0 for b in ranks] for a in ranks]
