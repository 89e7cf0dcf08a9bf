"""Make the machines of a hostfile ready for a run, as far as that can be done over ssh from the first one.

    mlx-empire setup HOSTFILE [--dry-run]
    mlx-empire setup HOSTFILE --launchd RECIPE > mlx-empire.plist

Keys, known hosts, and this repository with its environment at the same path. Each command is printed before it runs; a
machine that is ready is left alone. What is left to a person is said at the end. `--launchd` prints a job for macOS
that starts the run again after a power cut, and changes nothing.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_empire.cluster.hostfile import Cluster, Host
from mlx_empire.cluster.macos import SPOTLIGHT
from mlx_empire.cluster.other_hostfiles import load_any_hostfile
from mlx_empire.cluster.reach import is_here, of_all, typed_for
from mlx_empire.comm.failure import guard
from mlx_empire.errors import UnreachableError, UserArguments, UserError

DOCTOR = "`mlx-empire doctor HOSTFILE` says what is wrong"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    with guard(None):
        options = _parser().parse_args(arguments)
        cluster = load_any_hostfile(options.hostfile)
        if options.launchd is not None:
            from mlx_empire.setup.launchd import job

            sys.stdout.buffer.write(job(options.hostfile, options.launchd))
            return 0
        return _make_ready(cluster, dry_run=options.dry_run)
    raise AssertionError("guard does not return from an error")


def _parser() -> UserArguments:
    made = UserArguments(
        prog="mlx-empire setup",
        description="Make the machines of a hostfile ready for a run, over ssh from the first one.",
    )
    made.add_argument("hostfile", type=Path, help="mpirun's or MLX's, the first machine first")
    made.add_argument("--dry-run", action="store_true", help="only print the commands")
    made.add_argument(
        "--launchd", type=Path, metavar="RECIPE", help="only print a job that repeats this run's launch"
    )
    return made


def _make_ready(cluster: Cluster, *, dry_run: bool) -> int:
    """Do what is missing, machine by machine. UserError, UnreachableError."""
    from mlx_empire.run.mpirun import clean_environment
    from mlx_empire.setup.code import own_code
    from mlx_empire.setup.steps import Step, key_step, state_of, steps_for

    environment, own = clean_environment(os.environ), own_code()
    others = Cluster(tuple(host for host in cluster.nodes if not is_here(host)), cluster.source)
    states = of_all(others, lambda host: state_of(host, environment))
    steps: list[tuple[str, Step]] = []
    for host in others.nodes:
        steps += [(host.name, step) for step in steps_for(host, states[host.name], own)]
    if any(step.line.startswith("git ") for _, step in steps) and not Path(".git").exists():
        raise UserError("the machines get a copy of this repository: start this in a clone of it")
    if any(not state.reached for state in states.values()) and (key := key_step(Path.home())):
        steps.insert(0, ("this machine", key))
    for name, step in steps:
        print(f"{name}: {step.why}\n  {step.line}", flush=True)
        if (
            not dry_run
            and (code := subprocess.run(["/bin/sh", "-c", step.line], check=False).returncode) != 0
        ):
            raise UnreachableError(f"{name}: this ended with exit code {code}: {step.line}; {DOCTOR}")
    if not steps:
        print("every machine is ready")
    elif not dry_run:
        again = of_all(others, lambda host: state_of(host, environment))
        for host in others.nodes:
            if again[host.name].code != own:
                raise UnreachableError(
                    f"{host.name}: the code there is still another one: are there files here that git does not know, "
                    f"or older ones there? {DOCTOR}"
                )
    _offer(cluster.nodes)
    return 0


def _offer(hosts: Sequence[Host]) -> None:
    """What a person may do besides, where the machines are Macs."""
    if sys.platform != "darwin":
        return
    runs = shlex.quote(os.path.join(os.getcwd(), "runs"))
    print("so that nothing copies or reads runs while they are written:")
    for host in hosts:
        words = f"mkdir -p {runs} && tmutil addexclusion {runs} && touch {runs}/{SPOTLIGHT}"
        print(f"  {typed_for(host, words)}")
    print("so that a run goes on after a power cut: --launchd RECIPE prints a job for launchd")


if __name__ == "__main__":
    sys.exit(main())
