"""Hostfiles: Open MPI's grammar, the annotations, and one line for everything that is wrong."""

import subprocess
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_empire.cluster.hostfile import Cluster, Host, default_limit, load_hostfile, parse_hostfile
from mlx_empire.errors import UserError

REPOSITORY = Path(__file__).parents[2]
GIB = 2**30
KING = Host("king.local", 1, "king", 512 * GIB, 464 * GIB, chip="M3-Ultra")


def soldier(number: int) -> Host:
    return Host(f"soldier-{number}.local", 1, "soldier", 256 * GIB, 223_338_299_392, chip="M3-Ultra")


def test_the_empire() -> None:
    path = REPOSITORY / "hosts" / "empire.txt"
    assert load_hostfile(path) == Cluster((KING, soldier(1), soldier(2), soldier(3)), str(path))


@pytest.mark.parametrize(
    ("name", "roles"), [("2k2s", "kkss"), ("3k1s", "kkks"), ("4k", "kkkk"), ("empire", "ksss")]
)
def test_shipped_clusters(name: str, roles: str) -> None:
    nodes = load_hostfile(REPOSITORY / "hosts" / f"{name}.txt").nodes
    assert "".join(node.role[0] for node in nodes if node.role) == roles
    memory = {"king": 512 * GIB, "soldier": 256 * GIB}
    assert [node.memory_bytes for node in nodes] == [memory[node.role or ""] for node in nodes]


def test_the_local_cluster_is_measured() -> None:
    assert load_hostfile(REPOSITORY / "hosts" / "local.txt").nodes == (Host("localhost", 2),)


def test_every_form_of_a_line() -> None:
    text = """
# a comment with memory=nonsense is for people

bare
  two slots=2 max_slots=4
me@three.example.org slots = 3 max-slots = 3 port=22 # role = king memory = 1TiB limit=1000GB
10.0.0.4 # free words, then link=6.25GB/s and chip=M3-Ultra disk=1.5TB
five #role=soldier memory=1.5GiB
six # link=800MB/s limit=24GB\t
"""
    assert parse_hostfile(text, "x").nodes == (
        Host("bare"),
        Host("two", 2),
        Host("three.example.org", 3, "king", 2**40, 10**12),
        Host("10.0.0.4", link_bytes_per_second=6.25e9, chip="M3-Ultra", disk_bytes=15 * 10**11),
        Host("five", 1, "soldier", 3 * 2**29, 9 * 2**27),
        Host("six", limit_bytes=24 * 10**9, link_bytes_per_second=8e8),
    )


def test_default_limits() -> None:
    sizes = [512 * GIB, 256 * GIB, 128 * GIB, 4 * GIB]
    assert [default_limit(size) for size in sizes] == [464 * GIB, 208 * GIB, 96 * GIB, 3 * GIB]


MALFORMED = {
    "empty": ("", ("x: no hosts", "localhost slots=2")),
    "only comments": ("# king.local\n\n", ("x: no hosts",)),
    "option as host": ("-oProxyCommand=x slots=1\n", ("x:1: '-oProxyCommand=x' is not a host name",)),
    "option after user": ("me@-x\n", ("x:1: 'me@-x' is not a host name",)),
    "shell": ("a;reboot\n", ("x:1: 'a;reboot' is not a host name",)),
    "slash": ("../a\n", ("x:1: '../a' is not a host name",)),
    "not ASCII": ("könig\n", ("x:1: 'könig' is not a host name",)),
    "duplicate": ("a\nb\nA slots=2\n", ("x:3: A stands on line 1 already",)),
    "zero slots": ("a\nb slots=0\n", ("x:2: b: slots=0 is not a whole number from 1",)),
    "negative slots": ("a slots=-1\n", ("x:1: a: slots=-1",)),
    "no slots": ("a slots=\n", ("x:1: a: slots= is not a whole",)),
    "many slots": ("a slots=99999999999999999999\n", ("x:1: a: slots=9999",)),
    "slots twice": ("a slots=1 slots=2\n", ("x:1: a: slots stands here twice",)),
    "max below": ("a slots=3 max_slots=2\n", ("x:1: a: max_slots=2 is below slots=3",)),
    "unknown word": ("a slot=2\n", ("x:1: a: mpirun does not know 'slot=2' here; use slots=N",)),
    "missing hash": ("a memory=1GiB\n", ("x:1: a: mpirun does not know 'memory=1GiB'", "'# memory=1GiB'")),
    "two hosts": ("a b\n", ("x:1: a: mpirun does not know 'b' here",)),
    "unknown annotation": ("a # memroy=1GiB\n", ("x:1: a: unknown annotation 'memroy=1GiB'; use memory=",)),
    "strange annotation": ("a # q=1\n", ("x:1: a: unknown annotation 'q=1'; use role= or memory=",)),
    "a disk without unit": (
        "a # disk=12\n",
        ("x:1: a: disk=12 is not a size; write it such as disk=256GiB",),
    ),
    "no value": ("a # role=\n", ("x:1: a: role= has no value",)),
    "role": ("a # role=kng\n", ("x:1: a: role=kng is not a role; use king",)),
    "annotation twice": ("a # role=king role=king\n", ("x:1: a: role= stands here twice",)),
    "no unit": ("a # memory=512\n", ("x:1: a: memory=512 is not a size; write it such as memory=256GiB",)),
    "bad unit": ("a # memory=512Gib\n", ("memory=512Gib is not a size", "GiB")),
    "spaced unit": ("a # memory=512 GiB\n", ("memory=512 is not a size",)),
    "negative memory": ("a # memory=-1GiB\n", ("memory=-1GiB is not a size",)),
    "zero memory": ("a # memory=0GiB\n", ("memory=0GiB is not between 1MiB and",)),
    "huge memory": ("a # memory=999999999999TiB\n", ("memory=999999999999TiB is not between",)),
    "limit above memory": ("a # memory=1GiB limit=2GiB\n", ("limit=2GiB is more than memory=1GiB",)),
    "gigabits": ("a # link=10Gb/s\n", ("x:1: a: link=10Gb/s is not a speed", "link=1.1GB/s for 10 GbE")),
    "no speed": ("a # link=0\n", ("link=0 is not a speed",)),
    "byte-order mark": ("\ufeffa slots=1\n", ("x:1: ", "byte-order mark, which mpirun refuses")),
    "CRLF": ("a slots=1\r\nb slots=1\r\n", ("x:1: Windows line end, which mpirun refuses",)),
    "control character": ("a\nb\x1b[2J\n", ("x:2: 'b\\x1b[2J' contains a control character",)),
    "NUL": ("a\0\n", ("x:1: 'a\\x00' contains a control",)),
    "long name": ("a" * 300 + "\n", ("x:1: ", "is not a host name")),
}


@pytest.mark.parametrize(("text", "words"), MALFORMED.values(), ids=MALFORMED)
def test_malformed(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        parse_hostfile(text, "x")
    message = str(error.value)
    assert message.isprintable()
    assert error.value.exit_code == 64
    for word in words:
        assert word in message


@pytest.mark.parametrize("text", ["\ufefflocalhost slots=1\n", "localhost slots=1\r\n", "localhost slot=1\n"])
def test_what_is_refused_for_mpirun_is_refused_by_mpirun(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mpirun = Path(sysconfig.get_path("scripts")) / "mpirun"
    if not mpirun.exists():
        pytest.skip("mpirun is not in this environment")
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(name, "1")
    path = tmp_path / "hosts.txt"
    path.write_bytes(text.encode())
    command = [mpirun, "-hostfile", path, "-n", "1", "true"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert refused.returncode != 0
    assert "parse error in the hostfile" in refused.stdout + refused.stderr


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"a\n\xff\n")
    for path, words in {
        tmp_path / "missing.txt": "cannot read this hostfile (No such file",
        tmp_path: "a directory",
        tmp_path / "bytes": "bytes:2: byte 0xff is not UTF-8",
    }.items():
        with pytest.raises(UserError, match=r"hostfile|UTF-8") as error:
            load_hostfile(path)
        assert words in str(error.value)


@given(st.one_of(st.text(max_size=200), st.text("ab =#@-.\t\n1G/iBroleslotsmemory", max_size=100)))
def test_any_text_gives_a_cluster_or_one_line(text: str) -> None:
    message = ""
    try:
        assert parse_hostfile(text, "x").nodes
    except UserError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
