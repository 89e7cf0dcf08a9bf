"""Which network Macs train over where nobody names one. macOS's `route` is played by its own words."""

from __future__ import annotations

import sys

import pytest

from mlx_empire.cluster.hostfile import parse_hostfile
from mlx_empire.errors import UserError
from mlx_empire.run import network
from mlx_empire.run.network import chosen_interface, one_interface, read_route

MACS = parse_hostfile("king.local\nsoldier-1.local\nsoldier-2.local\n", "macs.txt")
ROUTE = """\
   route to: 169.254.188.12
destination: 169.254.188.12
       mask: 255.255.255.255
  interface: {}
      flags: <UP,HOST,DONE,LLINFO,WASCLONED,IFSCOPE,IFREF>
 recvpipe  sendpipe  ssthresh  rtt,msec    rttvar  hopcount      mtu     expire
"""


def test_the_interface_is_read_out_of_route_s_answer() -> None:
    assert read_route(ROUTE.format("bridge0")) == "bridge0"
    assert read_route("route: writing to routing socket: not in table\n") is None


def test_the_one_network_that_leads_to_all_others_is_taken() -> None:
    ways = {"king.local": "lo0", "soldier-1.local": "en8", "soldier-2.local": "en8"}
    assert one_interface(MACS, ways.get) == "en8"


@pytest.mark.parametrize(
    ("ways", "words"),
    [
        (
            {"soldier-1.local": "en0", "soldier-2.local": "en8"},
            "soldier-1.local by en0, soldier-2.local by en8",
        ),
        ({"soldier-1.local": "en0"}, "soldier-2.local by no route that is known"),
        ({"soldier-1.local": "lo0", "soldier-2.local": "lo0"}, "all are this one"),
    ],
)
def test_where_it_is_not_one_it_must_be_named(ways: dict[str, str], words: str) -> None:
    with pytest.raises(UserError) as refused:
        one_interface(MACS, ({"king.local": "lo0"} | ways).get)
    assert words in str(refused.value)
    assert "--interface en0" in str(refused.value)
    assert str(refused.value).isprintable()


def test_only_several_macs_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interface_to", lambda host: "lo0" if host == "king.local" else "en0")
    monkeypatch.setattr(sys, "platform", "linux")
    assert chosen_interface(MACS) is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert chosen_interface(MACS) == "en0"
    assert chosen_interface(parse_hostfile("localhost slots=4\n", "here.txt")) is None
