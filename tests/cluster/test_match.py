"""Ranks to nodes: names, shares of one machine, measured gaps; and finding the hostfile that mpirun was
given.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_empire.cluster.hostfile import Cluster, Host, Node, parse_hostfile
from mlx_empire.cluster.match import find_hostfile, hostfile_argument, match_ranks
from mlx_empire.errors import UserError

REPOSITORY = Path(__file__).parents[2]
GIB = 2**30
EMPIRE = parse_hostfile(
    "king.local # role=king memory=512GiB link=2GB/s\nsoldier-1.local # role=soldier memory=256GiB\n", "x"
)


SMALL, LARGE = (64 * GIB, 48 * GIB), (512 * GIB, 500 * GIB)


def measured(*names: str, sizes: tuple[int, int] = SMALL) -> list[Node]:
    return [Node(name, 1, None, *sizes, None, "M9") for name in names]


def match(cluster: Cluster | None, *names: str) -> list[Node]:
    """Machines that report more than any line of the hostfile, so that its lines are what is seen."""
    return match_ranks(cluster, names, measured(*names, sizes=LARGE if cluster else SMALL))


@pytest.mark.parametrize(
    "names",
    [
        ("king.local", "soldier-1.local"),
        ("KING.local", "Soldier-1.LOCAL."),
        ("king", "soldier-1"),
        ("king.lan", "soldier-1.fritz.box"),
    ],
)
def test_names_match_whatever_their_case_and_domain(names: tuple[str, str]) -> None:
    assert match(EMPIRE, *reversed(names)) == [
        Node("soldier-1.local", 1, "soldier", 256 * GIB, 208 * GIB, None, "M9"),
        Node("king.local", 1, "king", 512 * GIB, 464 * GIB, 2e9, "M9"),
    ]


def test_ranks_on_one_machine_divide_it() -> None:
    nodes = match(EMPIRE, "king.local", "soldier-1.local", "king.local")
    assert [node.memory_bytes for node in nodes] == [256 * GIB, 256 * GIB, 256 * GIB]
    assert [node.limit_bytes for node in nodes] == [232 * GIB, 208 * GIB, 232 * GIB]


@pytest.mark.parametrize(
    ("reported", "usable"),
    [((384, 192), (384, 192)), ((464, 208), (464, 208)), ((490, 250), (464, 208))],
    ids=["as macOS leaves them", "raised by sysctl", "raised above the hostfile's"],
)
def test_the_hostfile_may_only_lower_what_a_machine_reports(
    reported: tuple[int, int], usable: tuple[int, int]
) -> None:
    own = [
        Node(name, 1, None, memory * GIB, limit * GIB, None, "Apple M3 Ultra")
        for name, memory, limit in zip(("king", "soldier-1"), (512, 256), reported, strict=True)
    ]
    for lines in (
        "king # memory=512GiB\nsoldier-1 # memory=256GiB\n",
        "king # limit=464GiB\nsoldier-1 # limit=208GiB",
    ):
        nodes = match_ranks(parse_hostfile(lines, "x"), ["king", "soldier-1"], own)
        assert tuple(node.limit_bytes // GIB for node in nodes) == usable


def test_without_a_hostfile_everything_is_measured() -> None:
    nodes = match(None, "a", "b", "b")
    assert nodes[0] == Node("a", 1, None, 64 * GIB, 48 * GIB, None, "M9")
    assert nodes[1] == nodes[2] == Node("b", 1, None, 32 * GIB, 24 * GIB, None, "M9")


def test_gaps_are_filled_from_the_measurement_of_that_rank() -> None:
    cluster = Cluster(
        (Host("a", limit_bytes=20 * GIB), Host("b", role="king"), Host("c", limit_bytes=99 * GIB)), "x"
    )
    own = [
        Node(name, 1, None, size * GIB, size * GIB // 2) for name, size in (("a", 64), ("b", 32), ("c", 16))
    ]
    nodes = match_ranks(cluster, ["a", "b", "c"], own)
    assert [(node.memory_bytes // GIB, node.limit_bytes // GIB) for node in nodes] == [
        (64, 20),
        (32, 16),
        (16, 8),
    ]


@pytest.mark.parametrize("loopback", ["localhost", "127.0.0.1", "LocalHost"])
def test_localhost_is_this_machine_whatever_its_name(loopback: str) -> None:
    cluster = parse_hostfile(f"{loopback} slots=2 # memory=8GiB", "x")
    nodes = match(cluster, "vm.example.org", "vm.example.org")
    assert [(node.name, node.memory_bytes, node.slots) for node in nodes] == [
        ("vm.example.org", 4 * GIB, 2)
    ] * 2


def test_the_best_match_wins() -> None:
    cluster = parse_hostfile("king.lan # memory=1GiB\nking # memory=2GiB\nking.local # memory=3GiB", "x")
    nodes = match(cluster, "king", "king.local", "king.lan")
    assert [node.memory_bytes for node in nodes] == [2 * GIB, 3 * GIB, GIB]


def test_an_address_has_no_short_name() -> None:
    with pytest.raises(UserError, match=r"machine 10\.0\.0\.1 is not in the hostfile \(10\.0\.0\.2\)"):
        match(parse_hostfile("10.0.0.2", "x"), "10.0.0.1")


@pytest.mark.parametrize(
    ("cluster", "names", "words"),
    [
        (EMPIRE, ["king", "pawn"], "machine pawn is not in the hostfile (king.local, soldier-1.local)"),
        (parse_hostfile("k.a\nk.b", "x"), ["k"], "machine k could be any of several hosts (k.a, k.b)"),
        (parse_hostfile("localhost", "x"), ["a", "b"], "x:1: localhost matches two machines, a and b"),
        (EMPIRE, ["king.a", "king.b"], "x:1: king.local matches two machines, king.a and king.b"),
        (EMPIRE, ["evil\x1b\n"], "machine evil\\x1b\\n is not"),
    ],
)
def test_machines_that_fit_no_line_or_several(cluster: Cluster, names: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        match(cluster, *names)
    assert words in str(error.value)
    assert str(error.value).isprintable()


@given(st.lists(st.sampled_from(["king", "king.local", "soldier-1"]), min_size=1, max_size=9))
def test_a_machine_is_given_away_once(names: list[str]) -> None:
    names = ["king" if name == "king.local" else name for name in names]
    total = {"king": 512 * GIB, "soldier-1": 256 * GIB}
    nodes = match(EMPIRE, *names)
    for machine in set(names):
        given_away = sum(
            node.memory_bytes for node, name in zip(nodes, names, strict=True) if name == machine
        )
        assert total[machine] - len(names) < given_away <= total[machine]


@pytest.mark.parametrize(
    ("command", "hostfile"),
    [
        ("/venv/bin/prterun -hostfile hosts/a.txt -n 2 python -m x", "hosts/a.txt"),
        ("mpirun -n 2 --hostfile a.txt python", "a.txt"),
        ("mpirun -n 2 --machinefile=a.txt python", "a.txt"),
        ("mpiexec -machinefile a.txt python", "a.txt"),
        ("mpirun -n 2 python hostfile", None),
        ("mpirun -n 2 --hostfile", None),
        ("ssh -hostfile a.txt", None),
        ("", None),
    ],
)
def test_the_hostfile_in_a_command_line(command: str, hostfile: str | None) -> None:
    assert hostfile_argument(command.split()) == (Path(hostfile) if hostfile else None)


def test_what_the_user_says_comes_first(tmp_path: Path) -> None:
    argument, recipe = tmp_path / "a", tmp_path / "b"
    assert find_hostfile(recipe, argument) == argument
    assert find_hostfile(recipe, None) == recipe
    assert find_hostfile(None, None) is None  # pytest was not started by mpirun with a hostfile


def test_the_hostfile_of_a_real_mpirun(tmp_path: Path) -> None:
    """Relative to mpirun's directory, not to ours, and through a shell between mpirun and python."""
    mpirun = Path(sysconfig.get_path("scripts")) / "mpirun"
    if not mpirun.exists():
        pytest.skip("mpirun is not in this environment")
    (tmp_path / "my hosts.txt").write_text("localhost slots=1\n")
    code = "from mlx_empire.cluster.match import find_hostfile; print(find_hostfile(None, None))"
    shell = f"cd / && '{sys.executable}' -c '{code}'; true"
    environment = {
        **os.environ,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    if sys.platform == "darwin":
        pytest.skip("ps shows arguments without their boundaries: a path with a space is not found on macOS")
    ran = subprocess.run(
        [mpirun, "-hostfile", "my hosts.txt", "-n", "1", "sh", "-c", shell],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stdout.strip() == str(tmp_path / "my hosts.txt"), ran.stderr
