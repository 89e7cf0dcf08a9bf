"""Ask every machine of a hostfile what would stop a run, and say what mends it.

    mlx-empire doctor [HOSTFILE] [--recipe RECIPE] [--write-links] [--train]
                                  [--unit RECIPE] [--json]

All machines are asked at once, over ssh; then the speed of every pair is measured by MPI. Without a hostfile it is this
machine alone. mpirun's hostfile or MLX's (JSON). The table is printed whatever fails, and `check.json` in `--dir` has
all of it, and no variable of the environment. `--train` also trains a tiny model over all machines (`train`), `--unit`
one true layer of a recipe's model (`unit`). Exit code 0 if all is as it should be, 3 where that layer needs more memory
than is planned, else 1.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from mlx_empire.cluster.hostfile import Cluster, Node, parse_hostfile
from mlx_empire.cluster.other_hostfiles import (
    is_mlx_hostfile,
    load_any_hostfile,
    replace_hostfile,
    with_links,
    written_hostfile,
)
from mlx_empire.comm.failure import guard
from mlx_empire.doctor.findings import Findings
from mlx_empire.errors import EmpireError, UserArguments, UserError
from mlx_empire.recipe.load import load_recipe
from mlx_empire.recipe.packaged import host_file
from mlx_empire.run.names import RUNS

if TYPE_CHECKING:
    from mlx_empire.doctor.asking import MachineAnswer
    from mlx_empire.recipe.schema import Recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 if everything is as it should be."""
    with guard(None):
        options = _parser().parse_args(arguments)
        cluster = _machines(options)
        recipe = load_recipe(options.recipe) if options.recipe is not None else None
        options.dir.mkdir(parents=True, exist_ok=True)
        findings, failed = Findings(), 1
        try:
            failed = _look(options, cluster, recipe, findings)
        except KeyboardInterrupt:
            findings.add("this check", "here", "stopped by the keyboard", good=False)
        except EmpireError as error:
            findings.add("this check", "here", str(error), good=False)
        except Exception as error:  # whatever it is, what was found before is worth more
            findings.add("this check", "here", f"{type(error).__name__}: {error}", good=False)
        if options.json:
            print(findings.document(), end="")
        else:
            findings.show(Console())
        path = findings.write(options.dir)
        if not options.json:
            print(f"all of it is in {path}")
        return 0 if findings.good else failed
    raise AssertionError("guard does not return from an error")


def _parser() -> UserArguments:
    made = UserArguments(
        prog="mlx-empire doctor",
        description="Ask every machine of a hostfile what would stop a run, and say what mends it.",
    )
    made.add_argument(
        "hostfile", type=Path, nargs="?", help="mpirun's or MLX's; without one, this machine alone"
    )
    made.add_argument("--recipe", type=Path, help="also whether this recipe fits their memory and disks")
    made.add_argument("--train", action="store_true", help="also train a tiny model over all of them, twice")
    made.add_argument(
        "--unit", type=Path, metavar="RECIPE", help="also train one true layer of its model over all of them"
    )
    made.add_argument("--no-links", action="store_true", help="do not measure the speed between the machines")
    made.add_argument(
        "--write-links", action="store_true", help="write the measured speeds into the hostfile, as link="
    )
    made.add_argument("--interface", metavar="NAME", help="the network of the machines, such as en0")
    made.add_argument("--json", action="store_true", help="print JSON and nothing else")
    made.add_argument(
        "--dir", type=Path, default=RUNS / "check", help="the folder for check.json and the runs"
    )
    return made


def _machines(options: Namespace) -> Cluster:
    """The machines that are asked. UserError."""
    if options.hostfile is None:
        if options.write_links:
            raise UserError("--write-links: there is no hostfile to write into; name one")
        return parse_hostfile("localhost\n", "this machine")
    if options.write_links and is_mlx_hostfile(options.hostfile):
        raise UserError(
            f"--write-links: {options.hostfile}: MLX's hostfile has no place for speeds; without this option they "
            "are in the table, and `hosts.txt` in --dir is the same as a hostfile of mpirun"
        )
    if not options.write_links:  # what came with the package is not written into
        options.hostfile = host_file(str(options.hostfile))
    return load_any_hostfile(options.hostfile)


def _look(options: Namespace, cluster: Cluster, recipe: Recipe | None, findings: Findings) -> int:
    """Everything, in the order in which the first fault explains the later ones; the exit code where one is found."""
    # Only now: usage errors and --help need neither MLX nor numpy.
    from mlx_empire.doctor.asking import Question, ask_all
    from mlx_empire.doctor.judge import compare_all, per_machine, thunderbolt
    from mlx_empire.run.mpirun import clean_environment

    environment = clean_environment(os.environ)
    folders = list(dict.fromkeys((recipe.run.dir, recipe.model.path) if recipe else (RUNS,)))
    answers = ask_all(cluster, Question(folders, speed=options.train), environment)
    per_machine(cluster, answers, findings)
    compare_all(answers, findings)
    thunderbolt(answers, findings)
    if recipe is not None:
        _fit(recipe, cluster, answers, findings)
    hostfile = _plain_hostfile(options, cluster, findings)
    interface = _interface(options, cluster, findings)
    if not options.no_links:
        _links(options, cluster, answers, environment, interface, findings)
    if options.train:
        from mlx_empire.doctor.train import train_twice

        train_twice(hostfile, options.dir, cluster, environment, findings)
    if options.unit is None:
        return 1
    from mlx_empire.doctor.unit import train_one_layer

    code = train_one_layer(hostfile, options.unit, options.dir, cluster, environment, interface, findings)
    return code or 1


def _plain_hostfile(options: Namespace, cluster: Cluster, findings: Findings) -> Path:
    """A hostfile of mpirun with these machines: the one that was given, or one made of it in `--dir`."""
    if options.hostfile is not None and not is_mlx_hostfile(options.hostfile):
        return Path(options.hostfile)
    path = Path(options.dir) / "hosts.txt"
    path.write_text(written_hostfile(cluster.nodes))
    if options.hostfile is not None:
        findings.add("MLX's hostfile", str(options.hostfile), f"as a hostfile of mpirun: {path}")
    return path


def _interface(options: Namespace, cluster: Cluster, findings: Findings) -> str | None:
    """The network over which all is measured, and a row where macOS chooses it."""
    from mlx_empire.run.network import chosen_interface

    if options.interface is not None:
        return str(options.interface)
    try:
        chosen = chosen_interface(cluster)
    except UserError as error:
        findings.add("the network to all others", "here", str(error), False, "--interface NAME, such as en0")
        return None
    if chosen is not None:
        findings.add("the network to all others", "here", chosen)
    return chosen


def _fit(recipe: Recipe, cluster: Cluster, answers: Mapping[str, MachineAnswer], findings: Findings) -> None:
    """Rows on the recipe; one that says why there are none where a machine did not answer."""
    from mlx_empire.doctor.room import hold_against

    measured = {}
    for name, answer in answers.items():
        machine, disks = (answer.facts.get(key, {"problem": answer.reason}) for key in ("machine", "disks"))
        if "problem" in machine or "problem" in disks:
            findings.add(
                "the recipe", name, "not known whether it fits: this machine did not say what it has", False
            )
            return
        measured[name] = Node(**machine), min(disks.values())
    try:
        hold_against(recipe, cluster, measured, findings)
    except UserError as error:
        findings.add("the recipe", "here", str(error), False)


def _links(
    options: Namespace,
    cluster: Cluster,
    answers: Mapping[str, MachineAnswer],
    environment: Mapping[str, str],
    interface: str | None,
    findings: Findings,
) -> None:
    """Rows on the speed of every pair of machines that answer, and `link=` where that was asked for."""
    from mlx_empire.doctor.links import measure_links, rates_of_hosts

    hosts = [host for host in cluster.nodes if answers[host.name].facts]
    if len(cluster.nodes) < 2:
        return
    if len(hosts) < 2:
        findings.add("link", "all", "not measured: fewer than two machines answer", False)
        return
    try:
        pairs = measure_links(hosts, options.dir, environment, interface)
    except EmpireError as error:
        findings.add(
            "link", "all", f"not measured: {error}", False, "--interface NAME, or see the rows above"
        )
        return
    for (a, b), rate in pairs.items():
        findings.add(
            "link", f"{hosts[a].name} and {hosts[b].name}", f"{rate / 1e9:.3g} GB/s each way, both at once"
        )
    if options.write_links:
        rates = rates_of_hosts(pairs, len(hosts))
        text = Path(options.hostfile).read_text()
        named = {host.name: rate for host, rate in zip(hosts, rates, strict=True)}
        replace_hostfile(options.hostfile, with_links(text, str(options.hostfile), named))
        findings.add("link= in the hostfile", str(options.hostfile), ", ".join(named))


if __name__ == "__main__":
    sys.exit(main())
