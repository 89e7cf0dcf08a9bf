"""What an update evaluates at once, against every chunk walked one by one as the engine does."""

from itertools import accumulate, pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from mlx_empire.model.spec import BLOCK
from mlx_empire.plan.optimizer_bytes import largest_update
from mlx_empire.plan.shards import CHUNK_ELEMENTS, SHARED_ELEMENTS

FULL, SHARED = CHUNK_ELEMENTS // BLOCK, SHARED_ELEMENTS // BLOCK
sizes = st.one_of(st.integers(1, SHARED), st.integers(1, 4 * FULL))


@given(st.lists(sizes, min_size=1, max_size=8), st.floats(0, 1), st.floats(0, 1))
@example([SHARED // 2, SHARED // 2], 0.0, 1.0)
def test_the_largest_update_is_found_as_by_walking_the_chunks(rows: list[int], low: float, high: float):
    start, stop = sorted((int(low * sum(rows)), int(high * sum(rows))))
    chunks = []
    for first, end in pairwise(accumulate(rows, initial=0)):
        cuts = [first, *range(first + FULL, end, FULL), end]
        chunks += [max(0, min(b, stop) - max(a, start)) for a, b in pairwise(cuts)]
    waiting = together = 0
    for size in chunks:
        waiting = waiting + size if waiting + size <= SHARED else size
        together = max(together, waiting)
    found = largest_update(tuple(rows), start * BLOCK, stop * BLOCK)
    assert found == (together * BLOCK, max(chunks) * BLOCK)
