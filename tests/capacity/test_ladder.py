"""The ladder's rungs: each sets what it names, needs no more than the one below, and unlocks no less."""

import pytest
from support.planning import MIB, assess, catalog_spec, llama_like, nodes_of, recipe_of

from mlx_empire.capacity.ladder import RUNGS, UNLOCKED, ladder
from mlx_empire.model.target import catalog_target, in_dtype
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.hardware import standard_clusters
from mlx_empire.recipe.changes import variant

RECIPE = recipe_of("batch.global_size=4")
NAMES = ["llama-3.2-1b", "llama-3.1-8b", "mixtral-8x7b", "llama-4-scout-109b", "qwen2.5-32b", "falcon-40b"]


def unlocked(names):
    """The catalog models of `names` that can be trained here, as a ladder wants them."""
    targets = [catalog_target(name, variant(RECIPE, UNLOCKED)) for name in names]
    return [target.spec for target in targets if target.not_trainable is None]


@pytest.fixture(scope="module")
def scout():
    spec = catalog_spec("llama-4-scout-109b", RECIPE)
    return ladder(RECIPE, spec, standard_clusters()["1K+3S"], unlocked(NAMES), state_bytes_of)


def peaks_gb(rung):
    return [n.peak_bytes / 1e9 for n in rung.assessment.nodes]


def test_scout_stands_at_the_top_and_nowhere_below(scout):
    assert [r.assessment.verdict for r in scout] == ["no"] * 7 + ["fits"] * 2
    assert len(scout) == len(RUNGS)
    assert len({r.name for r in scout}) == len(scout)


def test_bytes_per_parameter_of_replicated_rungs(scout):
    """16 in float32; 2 + 2 + 2 + 8 with exact masters; 8.1 with codes: what stays whole on every node."""
    parameters = 107.77e9
    for rung, each in zip(scout, (16, 16, 14, 8.08), strict=False):
        for gb in peaks_gb(rung):
            assert gb * 1e9 == pytest.approx(each * parameters, rel=0.03)


def test_shares_by_memory_bring_soldiers_down_and_the_king_up(scout):
    equal, weighted = peaks_gb(scout[6]), peaks_gb(scout[7])
    assert max(equal) - min(equal) < 0.5
    assert weighted[0] > equal[0]
    assert weighted[1] < equal[1]
    # At 7 bytes per parameter (diet masters) equal shares are said to need about 216 GB: one byte less of a quarter.
    assert equal[1] - 107.77 / 4 * 1.09 == pytest.approx(216, rel=0.03)


def test_what_a_rung_unlocks_fits_and_the_next_larger_does_not(scout):
    sizes = {name: catalog_spec(name, RECIPE).base_parameters for name in NAMES}
    for kind, names in (
        ("dense", ["llama-3.2-1b", "llama-3.1-8b", "qwen2.5-32b", "falcon-40b"]),
        ("moe", NAMES[2:4]),
    ):
        found = [getattr(r, kind) for r in scout]
        counts = [u[1] if u else 0 for u in found]
        assert counts == sorted(counts), "a rung unlocks no less than the one below"
        assert all(u is None or (u[0] in names and sizes[u[0]] == u[1]) for u in found)
    for rung in scout[:-1]:
        for name in ("llama-3.1-8b", "qwen2.5-32b"):
            spec = in_dtype(catalog_spec(name, RECIPE), str(rung.assessment.recipe.model.dtype))
            found = assess(rung.assessment.recipe, spec, standard_clusters()["1K+3S"])
            assert (found.verdict != "no") == (rung.dense is not None and rung.dense[1] >= sizes[name])


def test_what_cannot_be_trained_is_unlocked_by_no_rung():
    """Rows longer than a window that mlx-lm's module lacks."""
    windowed = ["llama-3.2-1b", "phi-3-mini-3.8b"]
    assert [spec.name for spec in unlocked(windowed)] == ["llama-3.2-1b"]


def test_a_ladder_on_one_small_machine():
    rungs = ladder(RECIPE, llama_like(), nodes_of([64 * MIB]), unlocked(["llama-3.2-1b"]), state_bytes_of)
    assert {(r.dense, r.moe) for r in rungs} == {(None, None)}
    peaks = [peaks_gb(r)[0] for r in rungs]
    assert peaks[0] == max(peaks)
    assert max(peaks[3:]) < peaks[0] / 3


def test_another_dtype_changes_only_tensors_of_the_model_s_own():
    spec = catalog_spec("deepseek-v3-671b", recipe_of())
    wide = in_dtype(spec, "float32")
    assert wide.dtype == "float32"
    assert {t.dtype for u in wide.units for t in u.tensors} == {"float32"}
    assert wide.parameters == spec.parameters
    assert in_dtype(spec, "bfloat16") is spec
