"""Start a run over the machines of a hostfile, keep it alive, and look at it later.

    mlx-empire launch RECIPE --hosts FILE [--restarts N] [--detach] [--dry-run] [key=value ...]
    mlx-empire status RUN       how it goes
    mlx-empire attach RUN       the output of a detached run, until it ends
    mlx-empire stop RUN         save and stop

`python -m mlx_empire.launch` is the same, with these three words in the place of the recipe; HOSTFILE RECIPE, the
order of earlier versions, stays. Ctrl-C saves and stops, Ctrl-C again ends at once. Start it on the first machine of
the hostfile: the run's folder there says what was saved and whether it is complete.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mlx_empire.cluster.hostfile import Cluster, load_hostfile
from mlx_empire.cluster.reach import is_here
from mlx_empire.comm.failure import guard
from mlx_empire.errors import UserArguments, UserError
from mlx_empire.launch import detached
from mlx_empire.launch.machines import memory_of, probe_with
from mlx_empire.launch.notices import Notifier
from mlx_empire.launch.process import GRACE_SECONDS, Asked, say
from mlx_empire.launch.supervisor import PAUSE_SECONDS, Supervisor
from mlx_empire.recipe.arguments import RecipeArguments
from mlx_empire.recipe.load import load_recipe
from mlx_empire.recipe.packaged import host_file, recipe_file
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.caffeinate import keep_awake
from mlx_empire.run.launched import run_folder
from mlx_empire.run.mpirun import Launch, clean_environment, mpirun_line, printed
from mlx_empire.run.network import chosen_interface
from mlx_empire.run.status import status_rows

ABOUT_RUNS = ("status", "attach", "stop")
RESTARTS = 3
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with guard(None):
        if words and words[0] in ABOUT_RUNS:
            return look(words[0], words[1:])
        return start(read(words), words)
    raise AssertionError("guard does not return from an error")


def read(words: Sequence[str]) -> argparse.Namespace:
    """The options of a launch, also in the order HOSTFILE RECIPE."""
    options = parser().parse_intermixed_args(words)
    if options.hosts is None and options.overrides and "=" not in options.overrides[0]:
        words = [str(options.recipe), options.overrides.pop(0)]
        options.hosts, options.recipe = host_file(words[0]), recipe_file(words[1])
    return options


def parser() -> RecipeArguments:
    """The words of a launch."""
    made = RecipeArguments(
        "launch",
        "Start a run over the machines of a hostfile and keep it alive.",
        hosts="one line a machine, such as hosts/local.txt",
    )
    made.add_argument(
        "--restarts", type=int, default=RESTARTS, metavar="N", help=f"after a lost rank, at most ({RESTARTS})"
    )
    made.add_argument("--detach", action="store_true", help="go on when this terminal is closed")
    made.add_argument("--dry-run", action="store_true", help="only print the mpirun line")
    made.add_argument(
        "--interface",
        metavar="NAME",
        help="the network of the machines, such as en0 or bridge0; without it, on Macs the one that leads to all",
    )
    made.add_argument(
        "--forward",
        action="append",
        default=[],
        metavar="NAME",
        help="an environment variable that ranks may see",
    )
    made.add_argument(
        "--grace",
        type=float,
        default=GRACE_SECONDS,
        metavar="SECONDS",
        help="for mpirun to end after a failure",
    )
    made.add_argument(
        "--pause", type=float, default=PAUSE_SECONDS, metavar="SECONDS", help="before a restart"
    )
    return made


def start(options: argparse.Namespace, words: Sequence[str]) -> int:
    """A whole run and, where it missed its gate, those by its fallback; or the print of how it would be started."""
    if options.restarts < 0:
        raise UserError(f"--restarts {options.restarts}: expected 0 or more")
    # Only now: usage errors need no MLX.
    from mlx_empire.run.apart import refuse_mixed, refuse_recipe
    from mlx_empire.run.fallback import fallback_due, fallback_taken, refuse_fallback

    code = 0
    while code == 0:
        recipe = load_recipe(options.recipe, options.overrides)
        refuse_mixed(recipe, 0, socket.gethostname())
        refuse_recipe(recipe, options.recipe)
        refuse_fallback(recipe)
        if options.dry_run or (other := fallback_due(recipe)) is None:
            code = start_one(options, recipe, words)
            if code or options.dry_run or options.detach or (other := fallback_due(recipe)) is None:
                return code
        say(fallback_taken(recipe, other))
        options.recipe, options.overrides = other, []
    return code


def start_one(options: argparse.Namespace, recipe: Recipe, words: Sequence[str]) -> int:
    """One run, or the print of how it would be started. `words`: the command that was given, which goes on with it."""
    hosts = options.hosts or recipe.run.hosts
    if hosts is None:
        raise UserError("--hosts: say the hostfile of the machines, such as --hosts hosts/local.txt")
    cluster = load_hostfile(hosts)
    launch = Launch(
        hosts,
        cluster,
        options.recipe,
        tuple(options.overrides),
        options.interface or chosen_interface(cluster),
        tuple(options.forward),
        () if isinstance(recipe.memory.shares, str) else ("memory.shares=memory",),
    )
    environment = clean_environment(os.environ, launch.extra)
    if options.dry_run:
        print(printed(mpirun_line(launch, environment)))
        return 0
    folder = run_folder(recipe)
    if folder.complete:
        raise UserError(
            f"run.dir: {folder.path} holds a finished run; choose another run.dir or remove that folder"
        )
    refuse_elsewhere(cluster)
    detached.refuse_second(folder.path)
    if options.detach:
        return send_away(folder.path, [word for word in words if word != "--detach"])
    asked = Asked()
    keep_awake()
    resume = (
        f"cd {shlex.quote(os.getcwd())} && {printed([sys.executable, '-m', 'mlx_empire.launch', *words])}"
    )
    title = recipe.run.dir.absolute().name
    with folder, listening(asked), Notifier(recipe.report.notify, os.environ, title, say) as notices:
        return Supervisor(
            launch,
            folder,
            environment,
            asked,
            options.restarts,
            resume,
            probe_with(environment),
            memory_of(cluster, environment),
            options.grace,
            options.pause,
            notify=notices.send,
        ).run()


def refuse_elsewhere(cluster: Cluster) -> None:
    """UserError unless this is the first machine: rank 0 writes the run's folder there, and nothing else says whether
    the run is complete."""
    first = cluster.nodes[0]
    if not is_here(first):
        raise UserError(
            f"{cluster.source}:{first.line}: {first.name}: start the run on this machine, the first of the hostfile "
            f"(this one is {socket.gethostname()})"
        )


@contextmanager
def listening(asked: Asked) -> Iterator[None]:
    """Inside, the signals that end a program are requests to stop."""
    before = {number: signal.signal(number, lambda *_: on_request(asked)) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def on_request(asked: Asked) -> None:
    """The first request saves and stops, the second does not wait for that. Called by a signal's handler."""
    asked.stop()
    said = ["saving and stopping after this step; again ends at once", "ending at once"][
        min(asked.times, 2) - 1
    ]
    with suppress(OSError):  # the terminal may be what went away
        os.write(2, f"mlx_empire.launch: {said}\n".encode())  # print is not safe here


def send_away(folder: Path, words: Sequence[str]) -> int:
    """Start again without a terminal, and say where it is."""
    pid = detached.detach(folder, words)
    print(f"started as process {pid}; its output goes to {folder / 'launch.log'}")
    verbs = (
        ("status", "how it goes"),
        ("open", "in a browser"),
        ("attach", "watch it"),
        ("stop", "save and stop"),
    )
    for verb, what in verbs:
        print(f"  mlx-empire {verb} {shlex.quote(str(folder)):<20}  {what}")
    return 0


def look(verb: str, words: Sequence[str]) -> int:
    """`status`, `attach` or `stop` of a run."""
    asked = UserArguments(prog=f"mlx-empire {verb}")
    asked.add_argument("folder", type=Path, help="the run's folder")
    folder = asked.parse_args(words).folder
    if verb == "attach":
        return detached.attach(folder)
    if verb == "stop":
        detached.stop(folder)
        print(f"asked; it saves and stops after its step. See: mlx-empire status {folder}")
        return 0
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in status_rows(folder):
        table.add_row(name, value)
    Console(soft_wrap=False).print(table)
    return 0
