"""A cell's sum, apart from any step."""

import mlx.core as mx

from mlx_empire.engine.gradients import MicroBatchSum


def test_micro_batches_of_a_cell_are_added_in_float32_in_their_order():
    """In bfloat16 each 1 would be lost beside 256; 2^24 + 1 - 2^24 is 0 in this order alone."""
    cell = MicroBatchSum()
    for values in ([256.0, 2.0**24], [1.0, 1.0], [1.0, -(2.0**24)], [1.0, 0.0]):
        cell.add([mx.array(values, mx.bfloat16)])
    assert cell.arrays[0].dtype == mx.float32
    assert cell.arrays[0].tolist() == [259.0, 0.0]


def test_a_lone_micro_batch_stays_as_it_is():
    gradient, cell = mx.array([1.0, 3.0], mx.bfloat16), MicroBatchSum()
    cell.add([gradient])
    assert cell.arrays == [gradient]
