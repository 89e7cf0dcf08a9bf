"""Views, packing and the exactness of conversions."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_empire.comm.buffers import (
    ADDED_AT_ONCE,
    ADDED_BESIDE,
    SHARED_AMONG_THREADS,
    Adder,
    check_reduction,
    copy_interval,
    window,
)
from mlx_empire.comm.protocol import Wire
from mlx_empire.comm.solo import SoloCommunicator


def test_bfloat16_converts_exactly_as_mlx_does() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    total = np.zeros(bits.size, np.float32)
    Adder().add(total, [[(0, bits)]], "bfloat16")
    reference = np.array(mx.array(bits).view(mx.bfloat16).astype(mx.float32) + 0.0)
    finite = np.isfinite(reference)
    assert total[finite].tobytes() == reference[finite].tobytes()
    assert (np.isnan(total) == np.isnan(reference)).all()
    assert finite.sum() == 255 * 2 * 128


def test_blocks_leave_no_seams() -> None:
    random = np.random.default_rng(1)
    length = 2 * ADDED_AT_ONCE + 77
    parts = [random.standard_normal(length).astype(np.float32) for _ in range(3)]
    expected = parts[0].copy()
    expected[5:] += parts[1][5:]
    expected += parts[2]
    total = parts[0].copy()
    cut = ADDED_AT_ONCE + 3
    Adder().add(total, [[(5, parts[1][5:cut]), (cut, parts[1][cut:])], [(0, parts[2])]], "float32")
    assert total.tobytes() == expected.tobytes()


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("fresh", [False, True])
def test_any_number_of_threads_gives_the_bits_of_one(wire: Wire, fresh: bool) -> None:
    random = np.random.default_rng(2)
    length = SHARED_AMONG_THREADS + 5 * ADDED_AT_ONCE + 77
    dtype = {"float32": np.float32, "bfloat16": np.uint16}[wire]
    own = random.integers(0, 1 << 14, (3, length)).astype(dtype)
    pieces = [[(0, own[0])], [(5, own[1][5:300_000]), (400_000, own[1][400_000:])], [(0, own[2])]]
    start = random.standard_normal(length).astype(np.float32)
    expected = np.zeros_like(start) if fresh else start.copy()
    for offset, values in (piece for one in pieces for piece in one):
        wide = values.astype(np.uint32) << 16 if wire == "bfloat16" else values
        expected[offset : offset + values.size] += wide.view(np.float32)
    for threads in (1, 2, 3, 7):
        total = start.copy()
        Adder(threads).add(total, pieces, wire, fresh=fresh)
        assert total.tobytes() == expected.tobytes()


def test_pieces_that_are_added_at_once_have_the_bits_of_one_after_the_other() -> None:
    random = np.random.default_rng(3)
    sizes = [100, ADDED_BESIDE, 3 * ADDED_BESIDE + 7, ADDED_AT_ONCE + 5, SHARED_AMONG_THREADS + 77]
    bits = [random.integers(0, 1 << 14, (3, size)).astype(np.uint16) for size in sizes]
    for threads in (1, 4):
        adder = Adder(threads)
        totals = [np.full(size, np.nan, np.float32) for size in sizes]
        begun = [
            adder.begin(total, [[(0, one)] for one in own], "bfloat16", fresh=True)
            for total, own in zip(totals, bits, strict=True)
        ]
        beside = [0, 1, 1, 1, threads - 1] if threads > 1 else [0] * 5
        assert [len(runs) for runs in begun] == beside, "a large one is cut among all threads but the caller"
        for run in (run for runs in begun for run in runs):
            run.result()
        for total, own in zip(totals, bits, strict=True):
            first, second, third = (own.astype(np.uint32) << 16).view(np.float32)
            assert total.tobytes() == ((first + second) + third).tobytes()


def test_a_fresh_total_counts_as_zeros_whatever_it_holds() -> None:
    total = np.full(100, np.nan, np.float32)
    Adder().add(total, [[(10, np.full(5, -0.0, np.float32))]], "float32", fresh=True)
    assert total.tobytes() == np.zeros(100, np.float32).tobytes()
    SoloCommunicator("here").reduce_scatter([], [0, 100], total, [False], fresh=True)
    assert not total.any()


def test_one_piece_is_sent_without_a_copy() -> None:
    values = np.arange(100, dtype=np.float32)
    view = window([(10, values)], 20, 50)
    assert view is not None
    assert np.shares_memory(view, values)
    assert view.tolist() == list(range(10, 40))
    assert window([(10, values)], 5, 50) is None
    assert window([(10, values), (110, values)], 100, 120) is None
    assert window([], 0, 1) is None


def test_packing_fills_gaps_with_zeros() -> None:
    pieces = [
        (2, np.array([1, 2, 3], np.uint16)),
        (8, np.array([4, 5], np.uint16)),
        (20, np.ones(5, np.uint16)),
    ]
    out = np.full(10, 9, np.uint16)
    assert copy_interval(pieces, 3, 13, out).tolist() == [2, 3, 0, 0, 0, 4, 5, 0, 0, 0]
    assert copy_interval([], 3, 13, out).tolist() == [0] * 10


@pytest.mark.parametrize(
    "change",
    [
        {"pieces": [(0, np.ones(3, np.float64))]},
        {"pieces": [(5, np.ones(3, np.float32)), (6, np.ones(3, np.float32))]},
        {"pieces": [(8, np.ones(3, np.float32))]},
        {"pieces": [(0, np.ones((2, 2), np.float32))]},
        {"total": np.zeros(9, np.float32)},
        {"total": np.zeros(10, np.float64)},
        {"total": None},
        {"contributes": [True, True]},
    ],
)
def test_arguments_that_do_not_fit_are_a_programmers_error(change) -> None:
    fitting = {
        "rank": 0,
        "pieces": [(0, np.ones(3, np.float32))],
        "edges": [0, 10],
        "total": np.zeros(10, np.float32),
        "contributes": [True],
        "wire": "float32",
    }
    check_reduction(**fitting)
    with pytest.raises(AssertionError):
        check_reduction(**(fitting | change))
