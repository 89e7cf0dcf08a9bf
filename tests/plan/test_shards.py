"""The ShardPlan by properties: every element has one owner, whatever the shares, ranks and tensors."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_empire.errors import UserError
from mlx_empire.model.spec import BLOCK, SMALL_ELEMENTS, TensorSpec, UnitSpec
from mlx_empire.plan.shards import ShardPlan, cut, make_plan

dims = st.integers(1, 300)
tensors = st.builds(
    lambda i, shape, dtype, trainable: TensorSpec(f"t{i}.weight", tuple(shape), dtype, trainable),
    st.integers(0, 10**6),
    st.lists(dims, min_size=1, max_size=3),
    st.sampled_from(["bfloat16", "float32"]),
    st.booleans(),
)
units = st.lists(st.lists(tensors, max_size=6, unique_by=lambda t: t.name), min_size=1, max_size=3).map(
    lambda groups: [
        UnitSpec(f"u{i}", tuple(replace(t, name=f"u{i}.{t.name}") for t in group))
        for i, group in enumerate(groups)
    ]
)
shares = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=6).filter(any)


@given(units, shares, st.integers(0, 3))
def test_every_element_has_exactly_one_owner(unit_specs, weights, stage):
    plan = make_plan(unit_specs, weights, stage)
    assert plan.world_size == len(weights)
    for unit, spec in zip(plan.units, unit_specs, strict=True):
        placed = sorted(t.name for s in unit.segments for t in (p.tensor for p in s.placements))
        assert placed == sorted(t.name for t in spec.tensors)
        for segment in unit.segments:
            assert segment.edges[0] == 0
            assert segment.edges[-1] == segment.size
            assert all(a <= b for a, b in zip(segment.edges, segment.edges[1:], strict=False))
            assert all(edge % BLOCK == 0 for edge in segment.edges)


@given(units, shares)
def test_tensors_start_on_blocks_and_do_not_overlap(unit_specs, weights):
    for unit in make_plan(unit_specs, weights, 3).units:
        for segment in unit.segments:
            end = 0
            for placement in segment.placements:
                assert placement.start == end
                assert placement.start % BLOCK == 0
                end += placement.tensor.padded_size
                assert placement.tensor.kind == segment.kind
            assert end == segment.size


@given(units, shares, st.integers(0, 3))
def test_chunks_of_all_ranks_cover_each_row_once(unit_specs, weights, stage):
    plan = make_plan(unit_specs, weights, stage)
    for unit in plan.units:
        for segment in unit.segments:
            rows = []
            for rank in range(plan.world_size):
                for chunk in segment.chunks(*segment.interval(rank)):
                    _, _, placement = plan.tensors[chunk.name]
                    assert chunk.start_row - chunk.first_row == placement.start // BLOCK
                    rows += range(chunk.start_row, chunk.start_row + chunk.rows)
            assert rows == list(range(segment.size // BLOCK))


@given(units, shares, st.integers(0, 3))
def test_json_round_trip(unit_specs, weights, stage):
    plan = make_plan(unit_specs, weights, stage)
    assert ShardPlan.from_json(plan.to_json()) == plan


@given(st.integers(0, 10**7), st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_intervals_follow_the_shares_to_within_a_block(blocks, weights):
    total = sum(weights)
    edges = cut(blocks * BLOCK, [w / total for w in weights])
    for i, weight in enumerate(weights):
        assert abs((edges[i + 1] - edges[i]) / BLOCK - blocks * weight / total) <= 1 + blocks * 1e-9


@pytest.mark.parametrize(
    ("name", "shape", "trainable", "kind"),
    [
        ("model.layers.0.mlp.gate_proj.weight", (256, 64), True, "trainable"),
        ("model.layers.0.mlp.gate.weight", (256, 64), True, "small"),  # a router
        ("model.layers.0.feed_forward.router.weight", (16, 5120), True, "small"),
        ("model.norm.weight", (SMALL_ELEMENTS * 2,), True, "small"),
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), True, "small"),
        ("model.embed_tokens.weight", (1000, 64), False, "frozen"),
    ],
)
def test_kinds(name, shape, trainable, kind):
    assert TensorSpec(name, shape, "bfloat16", trainable).kind == kind


def test_small_segments_are_fp32_and_large_ones_keep_their_dtype():
    unit = UnitSpec(
        "u", (TensorSpec("a.weight", (128, 64), "bfloat16"), TensorSpec("norm.weight", (64,), "bfloat16"))
    )
    segments = make_plan([unit], [1, 1], 3).units[0].segments
    assert [(s.kind, s.dtype) for s in segments] == [("trainable", "bfloat16"), ("small", "float32")]


def test_a_layer_of_scout_does_not_overflow():
    experts = TensorSpec("experts.gate_proj.weight", (128, 8192, 5120), "bfloat16")  # 5.4e9 elements
    plan = make_plan([UnitSpec("layer", (experts,))], [0.42, 0.2, 0.19, 0.19], 3)
    (segment,) = plan.units[0].segments
    assert segment.edges[-1] == experts.size
    assert (
        sum(c.rows for r in range(4) for c in segment.chunks(*segment.interval(r))) == experts.size // BLOCK
    )


@pytest.mark.parametrize("weights", [[], [-1.0, 2.0], [0.0, 0.0]])
def test_impossible_shares_are_refused(weights):
    with pytest.raises(UserError, match=r"memory\.shares"):
        make_plan([], weights, 3)
