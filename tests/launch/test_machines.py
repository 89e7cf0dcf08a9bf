"""Which machines can be used: asked over what stands in for ssh, with a deadline, and no hostfile is ever changed."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from mlx_empire.cluster.hostfile import Host, load_hostfile, parse_hostfile
from mlx_empire.cluster.macos import read_vm_stat
from mlx_empire.cluster.reach import ask, is_here
from mlx_empire.launch.machines import away, memory_of, probe_with, wait_until_free, without

AGENT = """\
#!/bin/sh
echo "$@" >> {folder}/asked
case "$*" in
  *gone*) echo "ssh: connect to host gone.invalid: No route to host" >&2; exit 255 ;;
  *deaf*) exec sleep 30 ;;
esac
"""
VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                              4321.
Pages wired down:                      131072.
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    agent = tmp_path / "agent"
    agent.write_text(AGENT.format(folder=tmp_path))
    agent.chmod(0o700)
    return {"PATH": "/usr/bin:/bin", "PRTE_MCA_plm_ssh_agent": str(agent)}


def test_this_machine_has_many_names() -> None:
    own = socket.gethostname().split(".")[0]
    for name in ("localhost", "127.0.0.1", own, f"{own}.local"):
        assert is_here(Host(name)), name
    assert not is_here(Host("192.0.2.7"))
    assert not is_here(Host("unreachable.invalid"))


def test_who_does_not_answer_is_named_with_the_reason(environment: dict[str, str], tmp_path: Path) -> None:
    cluster = parse_hostfile("localhost\nme@there.invalid port=2222\ngone.invalid\ndeaf.invalid\n", "hosts")
    assert away(cluster, probe_with(environment, 1.0)) == {
        "gone.invalid": "ssh: connect to host gone.invalid: No route to host",
        "deaf.invalid": "no answer over ssh within 1 s",
    }
    assert "-l me -p 2222 there.invalid true" in (tmp_path / "asked").read_text()
    assert "localhost" not in (tmp_path / "asked").read_text()


def test_a_command_reaches_ssh_as_one_word(environment: dict[str, str], tmp_path: Path) -> None:
    ask(Host("there.invalid"), ["say", "a b; reboot"], environment)
    assert (tmp_path / "asked").read_text() == "there.invalid say 'a b; reboot'\n"
    assert ask(Host("localhost"), [sys.executable, "-c", "print(7)"], environment).stdout == "7\n"


def test_a_smaller_hostfile_keeps_every_word_of_the_others(tmp_path: Path) -> None:
    text = (
        "# mine\nking slots=1 # memory=512GiB\n\nme@soldier slots=2 port=22  # role=soldier my note\nlost\n"
    )
    (tmp_path / "hosts").write_text(text)
    path, cluster = without(load_hostfile(tmp_path / "hosts"), ["lost"], tmp_path)
    assert load_hostfile(path).nodes == cluster.nodes
    assert [host.name for host in cluster.nodes] == ["king", "soldier"]
    assert path.read_text().splitlines()[1:] == [text.splitlines()[1], text.splitlines()[3]]
    assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "hosts").read_text() == text


class Draining:
    """Memory that is given back step by step."""

    def __init__(self, *wired: int) -> None:
        self.values = list(wired)

    def wired(self) -> dict[str, int]:
        return {"king": (self.values.pop(0) if len(self.values) > 1 else self.values[0]) << 30}


def test_waits_until_memory_is_free_again() -> None:
    said: list[str] = []
    slept: list[float] = []
    memory = Draining(300, 120, 12)
    assert wait_until_free(memory, {"king": 10 << 30}, said.append, sleep=slept.append) == []
    assert len(slept) == 2
    assert said == ["waiting until the memory of the last run is free again on king"]


def test_does_not_wait_for_what_was_so_before_or_when_asked_to_stop() -> None:
    assert wait_until_free(Draining(300), {"king": 299 << 30}, pytest.fail) == []
    assert wait_until_free(Draining(300), {}, pytest.fail) == []
    assert wait_until_free(Draining(300), {"king": 0}, pytest.fail, stopped=lambda: True) == ["king"]


def test_vm_stat_is_read() -> None:
    assert read_vm_stat(VM_STAT) == 2 << 30
    assert read_vm_stat("vm_stat: not found") is None


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has wired memory")
def test_elsewhere_there_is_nothing_to_wait_for(environment: dict[str, str]) -> None:
    assert memory_of(parse_hostfile("localhost\n", "hosts"), environment).wired() == {}
