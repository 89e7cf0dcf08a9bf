"""Decides what is to do before a machine is ready, as lines of shell that a person could type as well.

A machine is ready when a command runs there over ssh without a password, and the code there is the code here. Only what
is missing is done. ssh-copy-id shows the host's key, which somebody has to confirm, and asks for the password once:
both at the terminal, and neither passes through here.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_empire.cluster.hostfile import Host
from mlx_empire.cluster.reach import ask, login, with_python

SECONDS = 60.0
KEYS = ("id_ed25519", "id_ecdsa", "id_rsa", "id_ed25519_sk", "id_ecdsa_sk")
Code = Mapping[str, str | None]


@dataclass(frozen=True)
class Step:
    """A line of shell, and what it is for."""

    why: str
    line: str


@dataclass(frozen=True)
class State:
    """How a machine stands: whether ssh reaches it without a password, and which code is there (None: none)."""

    reached: bool
    code: Code | None


def state_of(host: Host, environment: Mapping[str, str]) -> State:
    """Ask a machine."""
    try:
        if ask(host, ["true"], environment).returncode != 0:
            return State(False, None)
        done = ask(host, with_python(["-m", "mlx_empire.setup.code"]), environment, SECONDS)
        return State(True, json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        return State(True, None)
    except (OSError, subprocess.SubprocessError):
        return State(False, None)


def steps_for(host: Host, state: State, own: Code) -> Iterator[Step]:
    """What is to do, in order. Nothing for a machine that is ready."""
    name, here = login(host), shlex.quote(os.getcwd())
    if not state.reached:
        yield Step("its host key, which you confirm, and our key there", f"ssh-copy-id {name}")
    if state.code != own:
        unpack = shlex.quote(f"mkdir -p {here} && tar -xf - -C {here}")
        yield Step(
            "this repository, at the same path",
            f"git ls-files -z | tar -cf - --null -T - | ssh {name} {unpack}",
        )
        yield Step("its environment", f"ssh {name} {shlex.quote(f'cd {here} && make setup')}")


def key_step(home: Path) -> Step | None:
    """The step that makes a key for this machine; None where it has one."""
    if any((home / ".ssh" / f"{name}.pub").exists() for name in KEYS):
        return None
    return Step("a key for this machine", "ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519")
