"""Runs on every rank: all collectives against numpy, on data that every rank can recompute for all ranks."""

import os
import threading
import time
import zlib
from itertools import pairwise, product

import numpy as np
from mpi4py import MPI
from support.mpi import report

from mlx_empire.comm.checks import self_test
from mlx_empire.comm.connect import connect
from mlx_empire.comm.mpi import MpiCommunicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.errors import NumericsError
from mlx_empire.plan.traffic import EAGER_LIMIT, all_gather_bytes, reduce_scatter_bytes, scatter_bytes

SIZE = MPI.COMM_WORLD.size
INTERVALS = {  # unequal, odd, empty at the start, in the middle and at the end, nothing at all, equal
    1: [(0, 1000), (0, 0), (0, 1)],
    2: [(0, 700, 1000), (0, 0, 333), (0, 129, 129), (0, 512, 1024), (0, 0, 0)],
    3: [
        (0, 500, 777, 1000),
        (0, 0, 64, 999),
        (0, 400, 400, 641),
        (0, 3, 9, 9),
        (0, 256, 512, 768),
        (0, 0, 0, 0),
    ],
}[SIZE]
DTYPES = (np.uint16, np.float32, np.int8)
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def values(dtype, length, *key):
    """The same pseudo-random values on whichever rank asks."""
    random = np.random.default_rng([zlib.crc32(repr(key).encode()), length])
    if np.dtype(dtype) == np.float32:
        return (random.standard_normal(length) * 10.0 ** random.integers(-3, 4, length)).astype(np.float32)
    return random.integers(0, np.iinfo(dtype).max, length, dtype=dtype)


def wire_values(wire, length, *key):
    """(values as they travel, the same ones in float32); truncated to bfloat16 by hand."""
    full = values(np.float32, length, *key)
    if wire == "float32":
        return full, full
    if wire == "float16":
        half = full.astype(np.float16)
        return half, half.astype(np.float32)
    upper = (full.view(np.uint32) >> 16).astype(np.uint16)
    return upper, (full.view(np.uint32) & 0xFFFF0000).view(np.float32)


def cut_out(length, rank, case):
    """[start, stop) of the pieces that a rank contributes: in a third of the cases one, without a gap."""
    if (rank + case) % 3 == 0:
        return [(0, length)]
    borders = sorted({0, length, *(length * np.array([0.1, 0.13, 0.5, 0.77, 0.8])).astype(int).tolist()})
    return [(low, high) for index, (low, high) in enumerate(pairwise(borders)) if index % 2 == rank % 2]


def check_traffic(comm, before, predicted):
    moved = comm.traffic.since(before)
    assert moved.sent == predicted[comm.rank], (moved.sent, predicted[comm.rank])
    assert moved.received == [row[comm.rank] for row in predicted], (moved.received, predicted)


def check_all_gather(comm, route):
    for edges, dtype in product(INTERVALS, DTYPES):
        whole = values(dtype, edges[-1], "gather", edges)
        buffer = np.zeros_like(whole)
        own = slice(edges[comm.rank], edges[comm.rank + 1])
        buffer[own] = whole[own]
        before = comm.traffic.snapshot()
        comm.all_gather(buffer, edges)
        assert buffer.tobytes() == whole.tobytes(), (edges, dtype)
        check_traffic(comm, before, all_gather_bytes(edges, whole.itemsize, route))


def check_reduce_scatter(comm):
    """Equal bit for bit to adding rank after rank; and the order is seen: another order gives other bits."""
    order_matters = False
    flags = [[True] * SIZE, [False] * SIZE, *([rank != out for rank in range(SIZE)] for out in range(SIZE))]
    for case, (edges, wire, contributes) in enumerate(product(INTERVALS, ITEMSIZES, flags)):
        expected = values(np.float32, edges[-1], "total", edges)
        total = expected[edges[comm.rank] : edges[comm.rank + 1]].copy()
        backwards = expected.copy()
        addends, pieces = [], []
        for rank in range(SIZE):
            travelling, exact = wire_values(wire, edges[-1], "part", rank, edges)
            kept = np.zeros_like(exact)
            for low, high in cut_out(edges[-1], rank, case):
                kept[low:high] = exact[low:high]
                if rank == comm.rank:
                    pieces.append((low, travelling[low:high]))
            addends += [kept] if contributes[rank] else []
        for forward, backward in zip(addends, reversed(addends), strict=True):
            expected += forward
            backwards += backward
        order_matters |= expected.tobytes() != backwards.tobytes()
        before = comm.traffic.snapshot()
        if not contributes[comm.rank]:
            pieces = []
        comm.reduce_scatter(pieces, edges, total if total.size else None, contributes, wire)
        assert total.tobytes() == expected[edges[comm.rank] : edges[comm.rank + 1]].tobytes(), (edges, wire)
        check_traffic(comm, before, reduce_scatter_bytes(edges, ITEMSIZES[wire], contributes))
    assert order_matters or SIZE < 2


def check_scatter(comm):
    for edges, dtype, root in product(INTERVALS, DTYPES, range(SIZE)):
        whole = values(dtype, edges[-1], "scatter", edges)
        own = whole[edges[comm.rank] : edges[comm.rank + 1]]
        out = np.zeros_like(own)
        before = comm.traffic.snapshot()
        comm.scatter(whole if comm.rank == root else None, edges, out, root)
        assert out.tobytes() == own.tobytes()
        check_traffic(comm, before, scatter_bytes(edges, whole.itemsize, root))


def check_control(comm):
    before = comm.traffic.snapshot()
    for dtype in (np.float64, np.int32, np.uint8):
        gathered = comm.gather_arrays(np.arange(7 * comm.rank, dtype=dtype))
        for rank, array in enumerate(gathered):
            assert array.dtype == dtype
            assert array.tolist() == list(range(7 * rank))
    assert comm.broadcast_json({"rank": comm.rank, "text": "äöü", 1: (None, 2.5)}) == {
        "rank": 0, "text": "äöü", "1": [None, 2.5],
    }  # fmt: skip
    assert comm.gather_json("x" * comm.rank * 5000) == ["x" * rank * 5000 for rank in range(SIZE)]
    comm.barrier(30.0)
    assert comm.traffic == before, "the control plane is not counted"
    assert len(comm.hostnames) == SIZE
    assert comm.hostnames[comm.rank] == comm.hostname


def check_both_planes_at_once(comm):
    """Gathers and reductions on the communication thread while the main thread uses the control plane."""
    length = 300_000
    edges = [0, *(length * (rank + 1) // SIZE for rank in range(SIZE))]
    whole = values(np.float32, length, "both")
    own = slice(edges[comm.rank], edges[comm.rank + 1])
    rounds = 20
    buffers = [np.zeros_like(whole) for _ in range(rounds)]
    totals = [np.zeros(edges[comm.rank + 1] - edges[comm.rank], np.float32) for _ in range(rounds)]
    threads = set()

    def operation(buffer, total):
        threads.add(threading.get_ident())
        comm.all_gather(buffer, edges)
        comm.reduce_scatter([(0, buffer)], edges, total, [True] * SIZE)
        return comm.rank

    with CommThread() as thread:
        futures = []
        for buffer, total in zip(buffers, totals, strict=True):
            buffer[own] = whole[own]
            futures.append(thread.submit(operation, buffer, total))
        talks = 0
        while not all(comm.gather_json(futures[-1].done())):
            assert [a.tolist() for a in comm.gather_arrays(np.array([comm.rank]))] == [
                [r] for r in range(SIZE)
            ]
            comm.barrier(30.0)
            talks += 1
        assert [thread.wait(future) for future in futures] == [comm.rank] * rounds
        assert thread.busy_seconds > 0.0
    expected = np.zeros_like(whole)
    for _ in range(SIZE):
        expected += whole
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    assert all(buffer.tobytes() == whole.tobytes() for buffer in buffers)
    assert all(total.tobytes() == expected[own].tobytes() for total in totals)
    return talks


def check_transfer(comm):
    """Any buffers between any two ranks, of several dtypes and lengths, some larger than a bucket, some empty."""

    def messages(source, target):
        lengths = [(7 * source + 3 * target + k) % 5 * 211 for k in range(4)]
        return [values(DTYPES[k % 3], n, "transfer", source, target, k) for k, n in enumerate(lengths)]

    others = [peer for peer in range(SIZE) if peer != comm.rank]
    expected = [(peer, message) for peer in others for message in messages(peer, comm.rank)]
    receives = [(peer, np.zeros_like(message)) for peer, message in expected]
    comm.transfer([(peer, message) for peer in others for message in messages(comm.rank, peer)], receives)
    for (_, found), (_, message) in zip(receives, expected, strict=True):
        assert found.tobytes() == message.tobytes()
    comm.transfer([], [])


def check_duplicate(comm):
    """A duplicate is another thread's: both talk and move data at the same time and nothing is mixed up."""
    before = comm.traffic.snapshot()
    other = comm.duplicate(60.0)
    failures = []

    def work():
        try:
            for k in range(20):
                check_transfer(other)
                assert other.gather_json([k, other.rank]) == [[k, r] for r in range(SIZE)]
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    for k in range(20):
        assert comm.gather_json(["main", k]) == [["main", k]] * SIZE
    assert comm.traffic == before
    check_all_gather(comm, "auto")
    thread.join(60.0)
    assert not failures, failures


def check_self_test(comm):
    """The self-test passes, and names the rank that sends one wrong bit, seen by everyone who receives it."""
    self_test(comm)
    told = []
    for operation in ("all_gather", "reduce_scatter"):
        right = getattr(comm, operation)

        def wrong(*arguments, right=right, **keywords):
            sent = arguments[0]  # a buffer, or pieces of it
            if isinstance(sent, list):
                sent = sent[0][1] if sent else None
            if comm.rank == SIZE - 1 and sent is not None:
                sent.view(np.uint8)[-1] ^= 1  # its own last element, or its contribution to the last interval
            right(*arguments, **keywords)

        setattr(comm, operation, wrong)
        try:
            self_test(comm)
        except NumericsError as error:
            told.append(str(error))
        finally:
            delattr(comm, operation)
    assert len(told) == 2
    for error in told:
        assert f"from rank {SIZE - 1}" in error
        assert not any(f"from rank {rank}" in error for rank in range(SIZE - 1)), error


def idle_share(comm):
    """Share of a core that waiting for a late peer costs."""
    edges = [0, *(1000 * (rank + 1) for rank in range(SIZE))]
    comm.barrier(30.0)
    if comm.rank == SIZE - 1:
        time.sleep(1.0)
    wall, cpu = time.perf_counter(), time.process_time()
    comm.all_gather(np.zeros(edges[-1], np.float32), edges)
    return (time.process_time() - cpu) / 1.0, time.perf_counter() - wall


def check_pieces_between_machines():
    """Buckets of 4,096 bytes in pieces of 1,024, which every rank cuts alike though its own limit may be another."""
    os.environ[f"OMPI_MCA_{EAGER_LIMIT}"] = "2048" if MPI.COMM_WORLD.rank == 0 else "4096"
    for route in ("direct", "relay"):
        comm = MpiCommunicator(MPI.COMM_WORLD, f"host{MPI.COMM_WORLD.rank}", route, 4096, 60.0)
        assert comm.hostnames == [f"host{rank}" for rank in range(SIZE)]
        check_all_gather(comm, route)
        check_reduce_scatter(comm)
        check_scatter(comm)
        check_transfer(comm)


def main():
    for route, bucket_bytes in [
        ("direct", 64),
        ("relay", 64),
        ("direct", 999),
        ("relay", 999),
        ("auto", 1 << 20),
    ]:
        comm = connect(route, bucket_bytes, deadline_seconds=60.0)
        assert (comm.rank, comm.size) == (MPI.COMM_WORLD.rank, SIZE)
        check_all_gather(comm, route)
        check_reduce_scatter(comm)
        check_scatter(comm)
        check_control(comm)
        check_transfer(comm)
        if bucket_bytes == 64:
            assert comm.staging_bytes < 64 * 4 * SIZE + (1 << 19)
    check_pieces_between_machines()
    check_duplicate(comm)
    check_self_test(comm)
    talks = check_both_planes_at_once(comm)
    share, waited = idle_share(comm)
    report({"rank": comm.rank, "size": comm.size, "talks": talks, "idle_share": share, "waited": waited})


if __name__ == "__main__":
    main()
