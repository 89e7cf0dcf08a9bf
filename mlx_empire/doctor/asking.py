"""How each machine is asked, all at once, and what it means when one does not answer: the reason, and its remedy."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_empire.cluster.hostfile import Cluster, Host
from mlx_empire.cluster.reach import ask, login, of_all, with_python
from mlx_empire.recipe.text import one_line

SECONDS = 60.0
SSH_PORT = 22
LONGEST = 200  # characters of what ssh said
LOCAL_NETWORK = (
    "allow the terminal in System Settings, Privacy & Security, Local Network, or start from an ssh session"
)
# What stands in the words of ssh or of the shell there -> what is wrong, and what mends it. The first that fits.
REASONS: tuple[tuple[str, str, str], ...] = (
    ("cd: ", "there is no such folder there", "put this folder at the same path there: {here}"),
    ("exec: ", "there is no Python at the same path", "ssh {login} 'cd {here} && make setup'"),
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is another one than before",
        "if it was set up anew: ssh-keygen -R {name}, then ssh {login} once",
    ),
    (
        "Host key verification failed",
        "its host key is not known here",
        "ssh {login} once, and compare the key",
    ),
    (
        "Could not resolve hostname",
        "its name is not known here",
        "write what `hostname` prints there, or its address",
    ),
    (
        "Name or service not known",
        "its name is not known here",
        "write what `hostname` prints there, or its address",
    ),
    ("Permission denied", "it refuses our key", "ssh-copy-id {login}"),
    (
        "Connection refused",
        "nothing listens for ssh there",
        "turn on Remote Login there (Sharing), or start sshd",
    ),
    ("timed out", "it does not answer", "wake it or turn it on, and look at its cable"),
    ("ModuleNotFoundError", "its environment lacks a package", "ssh {login} 'cd {here} && make setup'"),
)
NO_ROUTE = ("No route to host", "Network is unreachable")


@dataclass(frozen=True)
class Question:
    """What every machine is asked: see `facts`."""

    folders: Sequence[Path]
    speed: bool = False


@dataclass(frozen=True)
class MachineAnswer:
    """What a machine said: its facts, or why there are none (`reason`, `said` in its own words, `mend`).

    `ahead`: seconds by which its clock is ahead of ours, to about a tenth. `seconds`: how long it took.
    """

    host: Host
    facts: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    said: str = ""
    mend: str = ""
    ahead: float = 0.0
    seconds: float = 0.0


def ask_all(cluster: Cluster, question: Question, environment: Mapping[str, str]) -> dict[str, MachineAnswer]:
    """Every machine's answer by name, in the hostfile's order. All are asked at once."""
    return of_all(cluster, lambda host: ask_one(cluster, host, question, environment))


def ask_one(
    cluster: Cluster, host: Host, question: Question, environment: Mapping[str, str]
) -> MachineAnswer:
    """One machine's answer."""
    others = {one.name: one.port or SSH_PORT for one in cluster.nodes if one is not host}
    asked = {"folders": [str(one) for one in question.folders], "others": others, "speed": question.speed}
    command = with_python(["-m", "mlx_empire.doctor.facts"])
    start = time.monotonic()
    try:
        done = ask(host, command, environment, SECONDS, json.dumps(asked))
    except subprocess.TimeoutExpired:
        return _silent(host, f"timed out: no answer within {SECONDS:g} s")
    except (OSError, subprocess.SubprocessError, UnicodeError) as error:
        return _silent(host, str(error))
    now, seconds = time.time(), time.monotonic() - start
    try:
        facts = json.loads(done.stdout.strip().splitlines()[-1])
        return MachineAnswer(host, facts, ahead=float(facts["clock"]) - now, seconds=seconds)
    except (ValueError, KeyError, TypeError, IndexError):
        return _silent(host, done.stderr.strip() or f"ended with exit code {done.returncode}")


def _silent(host: Host, said: str) -> MachineAnswer:
    reason, mend = why(host, said, answers_ping)
    return MachineAnswer(host, {}, reason, one_line(" ".join(said.split())[-LONGEST:]), mend)


def why(host: Host, said: str, pings: Callable[[str], bool]) -> tuple[str, str]:
    """(what is wrong, what mends it) from what ssh, or the shell over there, said.

    `pings(name)`: whether the machine answers a ping, asked only where there is no route to it.
    """
    if any(words in said for words in NO_ROUTE):
        if pings(host.name):
            return "no route to it, though it answers a ping: macOS lets no program through", LOCAL_NETWORK
        return "no route to it", "turn it on, and look at its cable and network"
    for words, reason, mend in REASONS:
        if words in said:
            return reason, mend.format(name=host.name, login=login(host), here=shlex.quote(os.getcwd()))
    return "it does not answer as it should", f"ssh {login(host)} true"


def answers_ping(name: str) -> bool:
    """Whether a machine answers one ping."""
    wait = ["-t", "2"] if sys.platform == "darwin" else ["-W", "2"]
    try:
        return (
            subprocess.run(
                ["ping", "-c", "1", *wait, name], capture_output=True, timeout=5, check=False
            ).returncode
            == 0
        )
    except (OSError, subprocess.SubprocessError):
        return False


def resolved(host: Host) -> str:
    """The address that a machine's name has here; "" where it has none."""
    try:
        return str(socket.getaddrinfo(host.name, 0, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return ""
