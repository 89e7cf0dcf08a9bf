"""The matrix against independently written arithmetic, and somebody's file against the matrix."""

import pytest
from support.planning import assess, catalog_spec, recipe_of

from mlx_empire.capacity.matrix import (
    Cell,
    Matrix,
    MatrixRow,
    catalog_name,
    compare,
    matrix,
    pooled_says,
    read_rows,
)
from mlx_empire.errors import UserError
from mlx_empire.model import catalog
from mlx_empire.model.target import catalog_target
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.hardware import standard_clusters
from mlx_empire.recipe.changes import variant

GB = 10**9
KING, SOLDIER = 464 * 2**30, 208 * 2**30
RECIPE = recipe_of("batch.global_size=4")
BY_HAND = {  # bytes per parameter: bfloat16 weight, remainder, gradient; two codes; three bfloat16 numbers per 64
    "parameter": 2 + 2 + 2 + 1 + 1 + 3 * 2 / 64,
}


@pytest.fixture(scope="module")
def whole() -> Matrix:
    targets = (catalog_target(name, RECIPE) for name in catalog.names())
    return matrix(RECIPE, ((target.spec, target.not_trainable) for target in targets), state_bytes_of)


def load_by_hand(name: str, kings: int) -> float:
    """What all shards need over what is left for shards, by published counts and the configuration alone.

    Beside its shard a node holds the root and its gradient, two layers, a layer's gradient, and a layer's work.
    """
    config, facts = catalog.load(name)
    text = config.get("text_config", config)
    parameters, layers, hidden = facts["text_parameters"], text["num_hidden_layers"], text["hidden_size"]
    embedding = text["vocab_size"] * hidden
    root = embedding * (1 if config.get("tie_word_embeddings") or name.startswith(("gemma", "falcon")) else 2)
    layer = 2 * (parameters - root) / layers
    tokens, heads = 2048, text["num_attention_heads"]
    inside = 2 * tokens * 30 * hidden + 3.4 * heads * tokens**2 * 2
    fixed = 2 * root + 4 * root + 3 * layer + layers * tokens * hidden * 2 + inside
    left = kings * (KING - fixed) + (4 - kings) * (SOLDIER - fixed)
    return parameters * BY_HAND["parameter"] / left if left > 0 else float("inf")


@pytest.mark.slow
def test_every_cell_agrees_with_arithmetic_by_hand(whole):
    """A cell is `no` where the shards need more than all nodes have left; within 5 % either answer is believed."""
    undecided = []
    for row in whole.rows:
        for kings, cluster in zip((1, 2, 3, 4), whole.clusters, strict=True):
            load = load_by_hand(row.model, kings)
            if abs(load - 1) < 0.05:
                undecided.append((row.model, cluster))
                continue
            assert (row.cells[cluster].verdict == "no") == (load > 1), (row.model, cluster, load)
    assert len(whole.rows) == 35
    assert len(undecided) <= 5, undecided


@pytest.mark.slow
def test_the_truths_that_the_matrix_must_tell(whole):
    cells = {(row.model, c): cell for row in whole.rows for c, cell in row.cells.items()}
    for model in ("llama-4-scout-109b", "mistral-large-123b"):  # with exact masters, 8.1 bytes per parameter
        assert cells[model, "1K+3S"].verdict == "fits"
        assert cells[model, "1K+3S"].zero_stage == 3
    assert cells["llama-4-scout-109b", "1K+3S"].bytes_per_parameter == pytest.approx(8.08, abs=0.01)
    assert cells["mixtral-8x22b", "1K+3S"].verdict == "no"
    falcon = cells["falcon-180b", "1K+3S"]
    assert (falcon.verdict, falcon.pooled_says) == ("no", "fits")
    assert {cells["deepseek-v3-671b", c].verdict for c in whole.clusters} == {"no"}
    barred = [row.model for row in whole.rows if row.not_trainable]
    windowed = [
        "phi-3-medium-14b",
        "phi-3-mini-3.8b",
    ]  # rows of 2,048 under a window of 2,047, which mlx-lm lacks
    assert barred == windowed
    for row in whole.rows:
        for cell in row.cells.values():
            assert (cell.verdict == "no") == (cell.headroom < 0)
            assert (cell.verdict == "fits") == (cell.headroom >= 0.05)
            assert cell.headroom_bytes == cell.limit_bytes - cell.peak_bytes


def test_diet_masters_bring_mixtral_in_and_with_released_gradients_falcon_180b_too():
    """7.1 and 5.1 bytes per parameter; with exact masters (6.1) Falcon stays out by 4 %."""
    nodes = standard_clusters()["1K+3S"]
    diet = recipe_of("batch.global_size=4", "optimizer.master_weights=diet")
    assert assess(diet, catalog_spec("mixtral-8x22b", diet), nodes).verdict != "no"
    falcon = catalog_spec("falcon-180b", diet)
    assert assess(diet, falcon, nodes).verdict == "no"
    assert assess(variant(diet, {"optimizer.in_backward": True}), falcon, nodes).verdict == "fits"
    exact = assess(variant(RECIPE, {"optimizer.in_backward": True}), falcon, nodes)
    assert exact.worst.headroom_bytes / exact.worst.limit_bytes == pytest.approx(-0.045, abs=0.03)


@pytest.mark.parametrize(
    ("billions", "kings", "says"),
    [
        (8, 1, "fits"),
        (180, 1, "fits"),
        (236, 1, "tight"),
        (236, 3, "fits"),
        (400, 4, "tight"),
        (400, 3, "no"),
    ],
)
def test_pooled_arithmetic_is_seven_or_five_bytes_per_parameter(billions, kings, says):
    nodes = next(n for n in standard_clusters().values() if sum(m.role == "king" for m in n) == kings)
    assert pooled_says(billions * 10**9, nodes) == says


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("Llama 4 Scout (109B MoE)", "llama-4-scout-109b"),
        ("Llama 3.2 1B", "llama-3.2-1b"),
        ("Qwen 2.5 7B", "qwen2.5-7b"),
        ("Mistral 7B", "mistral-7b-v0.3"),
        ("Mistral Large 123B", "mistral-large-123b"),
        ("Mixtral 8x7B (47B MoE)", "mixtral-8x7b"),
        ("DeepSeek V2 (236B MoE)", "deepseek-v2-236b"),
        ("DeepSeek Coder 33B", "deepseek-coder-33b"),
        ("Gemma 2B", "gemma-2b"),
        ("Gemma 2 27B", "gemma-2-27b"),
        ("Phi-3 Mini 3.8B", "phi-3-mini-3.8b"),
        ("GPT-5", None),
        ("", None),
    ],
)
def test_names_as_people_write_them(written, name):
    assert catalog_name(written) == name


def made_up() -> Matrix:
    def cell(verdict: str, peak: int) -> Cell:
        return Cell(verdict, 3, (100 - peak) / 100, "fits", "king-1", peak * GB, 100 * GB, 7 * GB, 8.1, "")

    rows = (
        MatrixRow("gemma-2b", 10 * GB, 10 * GB, None, {"1K+3S": cell("fits", 50), "4K": cell("tight", 97)}),
        MatrixRow("mixtral-8x22b", 20 * GB, 5 * GB, None, {"1K+3S": cell("no", 120), "4K": cell("no", 110)}),
        MatrixRow(
            "falcon-7b",
            7 * GB,
            7 * GB,
            "mlx-lm has no falcon",
            {"1K+3S": cell("fits", 9), "4K": cell("fits", 8)},
        ),
    )
    return Matrix(
        ("1K+3S", "4K"), {"1K+3S": 250 * GB, "4K": 150 * GB}, {"1K+3S": 200 * GB, "4K": 100 * GB}, rows
    )


def test_differences_say_why_in_one_sentence():
    lines = [
        "model,parameters,1K+3S,4K,8K",
        "Gemma 2B,2B,NO,YES,YES",
        "Mixtral 8x22B,141B,YES,YES,",
        "Falcon 7B,7B,YES,NO,",
        "GPT-5,?,NO,NO,",
    ]
    text = "\n".join(lines)
    found = compare(made_up(), read_rows(text, "mine.csv"))
    told = {(d.model, d.cluster): d for d in found.differences}
    assert list(told) == [
        ("gemma-2b", "1K+3S"),
        ("gemma-2b", "4K"),
        ("mixtral-8x22b", "1K+3S"),
        ("mixtral-8x22b", "4K"),
        ("falcon-7b", "1K+3S"),
    ]
    assert (found.same, found.unknown) == (1, ("GPT-5",))
    assert told["gemma-2b", "1K+3S"].why == (
        "it fits: divided by each machine's free memory (ZeRO-3), 81 GB at 8.1 bytes per parameter leave 50 % on the "
        "fullest machine"
    )
    assert "3.0 % left is less than the 5 % of a careful plan" in told["gemma-2b", "4K"].why
    assert told["mixtral-8x22b", "1K+3S"].why == (
        "162 GB at 8.1 bytes per parameter would go into the 200 GB that the GPUs may use, but every machine needs "
        "about 7 GB beside its share of them, so king-1 needs 120 of the 100 GB that its GPU may use"
    )
    assert told["mixtral-8x22b", "4K"].why == (
        "162 GB at 8.1 bytes per parameter are more than the 100 GB that the GPUs may use of 150 installed"
    )
    assert told["falcon-7b", "1K+3S"].verdict == "not trainable"
    assert all("\n" not in d.why for d in found.differences)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"mine\.csv:1: needs a column `model`"),
        ("model,parameters\nx,1\n", r"mine\.csv:1: needs a column"),
        ("model,4K\nGemma 2B,MAYBE\n", r"mine\.csv:2: 4K: 'MAYBE' is none of YES, TIGHT, NO"),
        ("model,4K\n" + "a,NO\n" * 10_001, "more than 10000 rows"),
    ],
)
def test_files_that_are_no_matrix(text, message):
    with pytest.raises(UserError, match=message):
        read_rows(text, "mine.csv")


def test_rows_may_be_short_and_quoted():
    (row,) = read_rows('\ufeffmodel,1K+3S,4K\n"Gemma 2B",yes\n', "mine.csv")
    assert (row.model, row.says) == ("Gemma 2B", {"1K+3S": "YES", "4K": ""})
