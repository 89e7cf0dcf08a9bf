"""Wires that hostfiles name, and the clusters and prices of the empire."""

import pytest

from mlx_empire.cluster.hostfile import Node, parse_hostfile
from mlx_empire.errors import UserError
from mlx_empire.plan.chips import price_of
from mlx_empire.plan.hardware import (
    KING,
    SOLDIER,
    WIRES,
    standard_clusters,
    wire_named,
    wire_of,
)
from mlx_empire.plan.node_kernels import linear_in
from mlx_empire.sizes import GIB


def node(chip=None, role=None, memory=64 * GIB, link=None) -> Node:
    return Node("a", 1, role, memory, memory // 2, link, chip)


def test_every_wire_says_where_its_figures_are_from():
    for one in WIRES:
        assert one.mark in ("measured", "reported", "planned")
        assert one.source


def test_the_clusters_are_those_of_the_hostfiles(request):
    names = {"1K+3S": "empire.txt", "2K+2S": "2k2s.txt", "3K+1S": "3k1s.txt", "4K": "4k.txt"}
    clusters = standard_clusters()
    assert list(clusters) == list(names)
    for cluster, file in names.items():
        hosts = parse_hostfile((request.config.rootpath / "hosts" / file).read_text("utf-8"), file).nodes
        told = [(h.role, h.memory_bytes, h.limit_bytes) for h in hosts]
        assert told == [(n.role, n.memory_bytes, n.limit_bytes) for n in clusters[cluster]]


def test_the_slowest_link_of_a_hostfile_is_the_wire():
    assert wire_of([node(), node()]).key == "10gbe"
    wire = wire_of([node(link=6e9), node(link=1.1e9)])
    assert (wire.rate, wire.per) == ((1.1e9, 1.1e9), "card")
    assert wire_named("mesh").per == "pair"
    with pytest.raises(UserError, match=r"wire token-ring: unknown; known: 10gbe"):
        wire_named("token-ring")


def test_prices_are_of_machines_with_that_memory():
    assert price_of(KING.node("k")) == 11_699
    assert price_of(node()) is None
    assert SOLDIER.node("s").limit_bytes == 223_338_299_392


@pytest.mark.parametrize(
    ("mlx", "linear"), [("0.32.3", False), ("0.32.4", True), ("0.33.0.dev1", True), ("1.0", True)]
)
def test_attention_is_linear_from_a_version_of_mlx_on(mlx, linear):
    assert linear_in(mlx) is linear
