"""What Macs lend their GPUs: an untouched Mac's verdict, and the exact command where a plan needs more."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.planning import llama_like, recipe_of

from mlx_empire.cluster.hostfile import Node
from mlx_empire.errors import DoesNotFitError
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.wired_limit import fitting_plan, raising_commands, untouched

GIB = 2**30


def mac(name: str, memory: int, limit: int, measured: bool = True) -> Node:
    return Node(name, 1, None, memory, limit, None, "Apple M3 Ultra", measured=measured)


def test_an_untouched_mac_lends_three_quarters_and_a_measured_one_what_it_says() -> None:
    planned, asked = (mac("king", 512 * GIB, 464 * GIB, measured) for measured in (False, True))
    assert untouched(planned).limit_bytes == 384 * GIB
    assert untouched(asked) == asked
    lowered = replace(planned, limit_bytes=100 * GIB)
    assert untouched(lowered) == lowered
    linux = Node("box", 1, None, 64 * GIB, 60 * GIB, measured=False)
    assert untouched(linux) == linux


def test_the_command_names_megabytes_of_the_whole_machine_and_only_where_it_is_needed() -> None:
    nodes = [mac("king", 256 * GIB, 232 * GIB)] * 2 + [mac("soldier", 256 * GIB, 208 * GIB)]
    now = [replace(n, limit_bytes=192 * GIB) for n in nodes]
    assert raising_commands([200 * GIB, 150 * GIB, 182 * GIB], nodes, now) == {}
    assert raising_commands([200 * GIB, 199 * GIB, 182 * GIB], nodes, now) == {
        "king": "sudo sysctl iogpu.wired_limit_mb=475136"
    }


def test_a_run_that_would_fit_a_raised_mac_says_how_to_raise_it() -> None:
    recipe, spec = recipe_of(), llama_like()
    states = state_bytes_of(recipe.optimizer)
    stingy = mac("king", 64 * GIB, 1 << 20)
    with pytest.raises(DoesNotFitError) as refused:
        fitting_plan(recipe, spec, [stingy], states)
    said = str(refused.value)
    assert said.startswith("king (rank 0) needs ")
    assert "on king `sudo sysctl iogpu.wired_limit_mb=49152` (in the hostfile limit=48GiB for king)" in said
    assert "\n" not in said
    with pytest.raises(DoesNotFitError) as final:  # not a Mac: there is nothing to raise
        fitting_plan(recipe, spec, [replace(stingy, chip=None)], states)
    assert "sysctl" not in str(final.value)
    assert fitting_plan(recipe, spec, [replace(stingy, limit_bytes=48 * GIB)], states).fits
