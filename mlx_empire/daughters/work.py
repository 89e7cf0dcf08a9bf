"""How daughters are trained: people are spread over the machines of the hostfile by what each has room for; those on
one machine share one resident base and pass each layer together. The command may be killed and given again: what is
finished is never trained again, what is not goes on from where it was last saved (`run.save_every`).

One process, the overseer, shows the table; workers do the work: one on this machine, or under mpirun one on each.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from mlx_empire import progress
from mlx_empire.checkpoint.manifest import sampled_digest
from mlx_empire.cluster.hostfile import Node, load_hostfile
from mlx_empire.comm.connect import connect
from mlx_empire.comm.failure import arm_faults, guard, together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.daughters import machine, watch
from mlx_empire.daughters.changed import changed
from mlx_empire.daughters.jobs import (
    BEFORE,
    CHANGED,
    FAILED,
    WAITING,
    Jobs,
    JobState,
    chosen_of,
    deal,
    event,
    homes_of,
    is_finished,
)
from mlx_empire.daughters.many import place_of
from mlx_empire.daughters.source import JobSource
from mlx_empire.daughters.table import DaughterTable
from mlx_empire.errors import EmpireError, UserError
from mlx_empire.recipe.load import load_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.run.agree import share_nodes, share_recipe
from mlx_empire.run.apart import refuse_overlap
from mlx_empire.run.caffeinate import keep_awake
from mlx_empire.run.fallback import fallback_due, fallbacks_of, refuse_fallback
from mlx_empire.run.lock import RunLock
from mlx_empire.run.mpirun import clean_environment, worker_line
from mlx_empire.run.network import chosen_interface
from mlx_empire.run.what_next import next_of_many
from mlx_empire.sizes import amount

SOME_FAILED = 65


def daughters_command(options: argparse.Namespace, words: Sequence[str]) -> int:
    """What the command line, `words`, asks for: to oversee, or to be a worker. Returns the exit code."""
    with guard(None):
        if not options.work:
            return oversee(words, options)
        comm = connect()
    with guard(comm):
        return work(comm, options)
    raise AssertionError("guard does not return from an error")


def oversee(words: Sequence[str], options: argparse.Namespace) -> int:
    """What the command does but the work: once, again and again, or about generations that there are."""
    recipe, people = load_recipe(options.recipe, options.overrides), options.people
    refuse(recipe, people)
    if options.rollback or options.pin or options.unpin:
        return watch.manage(JobSource(recipe, people), options.rollback, options.pin, options.unpin)
    hosts = options.hosts or recipe.run.hosts
    if not options.watch:
        return oversee_and_fall_back(words, recipe, options)
    watch.refuse_unwatchable(recipe)
    one_round = partial(oversee_once, words, recipe, people, hosts, options.only, watched=True)
    return (
        one_round()
        if options.once
        else watch.again_and_again(JobSource(recipe, people), one_round, options.every, (0, SOME_FAILED))
    )


def refuse(recipe: Recipe, people: Path) -> None:
    """UserError for what daughters cannot be trained by, be it the recipe given or one of its fallbacks."""
    if recipe.data.sources:
        raise UserError(
            f"data.sources: {recipe.data.named}: each person's rows are in --people; give data.sources=[] and "
            f"data.path={people}"
        )
    refuse_overlap("run.dir", recipe.run.dir, [("model.path", recipe.model.path), ("--people", people)])
    machine.refuse_unbuilt(recipe)


def refuse_fallbacks(recipe: Recipe, people: Path) -> None:
    """UserError for a fallback that could not be taken, or that daughters cannot be trained by."""
    refuse_fallback(recipe)
    for path, other in fallbacks_of(recipe):
        try:
            refuse(other, people)
        except UserError as error:
            raise UserError(f"evaluation.fallback: {path}: {error}") from None


def oversee_and_fall_back(words: Sequence[str], recipe: Recipe, options: argparse.Namespace) -> int:
    """Train all who are asked for, and by its fallback whoever missed the recipe's gate. Returns the exit code, which
    is 0 where every daughter of every round is there.
    """
    people, only, some_failed = options.people, list(options.only), False
    refuse_fallbacks(recipe, people)
    while True:
        code = oversee_once(words, recipe, people, options.hosts or recipe.run.hosts, only)
        some_failed |= code == SOME_FAILED
        source = JobSource(recipe, people)
        missed = [name for name in chosen_of(people, only) if fallback_due(source.of(name)) is not None]
        if code not in (0, SOME_FAILED) or not missed:
            return code or (SOME_FAILED if some_failed else 0)
        assert recipe.evaluation.fallback is not None
        print(
            f"{', '.join(missed)}: the gate was not reached, so evaluation.fallback is taken: "
            f"{recipe.evaluation.fallback}"
        )
        path, only = recipe.evaluation.fallback, missed
        recipe = load_recipe(path)
        words = [str(path), "--people", str(people), *(f"--only={name}" for name in only)]
        words += [
            f"--together={options.together}",
            *(["--hosts", str(options.hosts)] if options.hosts else []),
        ]


def oversee_once(
    words: Sequence[str],
    recipe: Recipe,
    people: Path,
    hosts: Path | None,
    only: Sequence[str] = (),
    *,
    watched: bool = False,
) -> int:
    """Start the workers and show what they say, until they end; `watched`: they find out what is new."""
    names = chosen_of(people, only)
    other = {} if watched else changed(recipe, people, names)
    anew = recipe.run.resume == "never"
    jobs = Jobs({n: _state(n, is_finished(recipe, n), other.get(n), anew=anew) for n in names})
    if not watched and not any(state.state == WAITING for state in jobs.states.values()):
        if other:
            with DaughterTable(jobs) as update:
                update()
        return _over(recipe, jobs)
    cluster = load_hostfile(hosts) if hosts is not None else None
    alone = cluster is None or sum(host.slots for host in cluster.nodes) == 1
    line = [sys.executable, "-u", "-m", "mlx_empire.daughters", *words, "--work"]
    if not alone:
        assert cluster is not None
        assert hosts is not None
        interface = None
        with suppress(UserError):  # workers exchange a few words: any network will do
            interface = chosen_interface(cluster)
        line = worker_line(hosts, cluster, line, clean_environment(os.environ), interface)
    with RunLock(recipe.run.dir) as lock, DaughterTable(jobs) as update:
        if lock.note:
            print(lock.note)
        code = _listen(line, jobs, update, lock.file)
    over = _over(recipe, jobs, watched=watched)
    return code or over


def _state(name: str, finished: bool, other: str | None, *, anew: bool) -> JobState:
    """Where a daughter stands before anything is started; `other`: what has changed since it was finished."""
    if not finished or (other and anew):
        return JobState(name)
    return JobState(name, state=CHANGED, note=other) if other else JobState(name, state=BEFORE)


def _over(recipe: Recipe, jobs: Jobs, *, watched: bool = False) -> int:
    """Say how many daughters there are, what to do about changed ones, and what comes next; the exit code."""
    left = [name for name, state in jobs.states.items() if state.state == CHANGED]
    print(f"{jobs.finished} of {len(jobs.states)} daughters are in {recipe.run.dir}")
    if left and watched:
        print(
            f"{', '.join(left)}: left as they are: bring their base or recipe back, or begin anew in another "
            "run.dir; run.accept_changes=[optimizer.learning_rate] (or another key) takes a recipe as it is by now"
        )
    elif left:
        print(
            f"{', '.join(left)}: changed since they were finished, and left as they are: --watch goes on from them "
            "with their new rows; run.resume=never trains them anew and replaces their final/; "
            "run.accept_changes=[data.path] (or another key) keeps them"
        )
    if finished := [name for name in jobs.states if is_finished(recipe, name)]:
        print(*next_of_many(recipe, finished[0]), sep="\n")
    return SOME_FAILED if jobs.finished < len(jobs.states) else 0


def _listen(line: Sequence[str], jobs: Jobs, update: Callable[[], None], lock: int) -> int:
    """Start the workers by this line and take in what they say, until they end; the exit code. They hold the `lock` as
    well: who outlives this process, perhaps for a long step, still trains in the folder."""
    environment = clean_environment(os.environ)
    environment.pop(progress.LAUNCHER_VARIABLE)  # nobody reads what a run tells its supervisor
    process = subprocess.Popen(
        list(line),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=(lock,),
    )
    assert process.stdout is not None
    try:
        for said in process.stdout:
            if not jobs.take(said.rstrip("\n")):
                print(said, end="")
            update()
    except KeyboardInterrupt:
        process.terminate()
    code = process.wait()
    jobs.end()
    return code if code >= 0 else 75


def work(comm: Communicator, options: argparse.Namespace) -> int:
    """A worker: find out which daughters are left and on which worker, and train its own."""
    arm_faults(comm.rank)
    keep_awake()
    people = options.people
    recipe = share_recipe(comm, options.recipe, options.overrides)
    nodes = share_nodes(comm, recipe, options.hosts)
    node, jobs = nodes[comm.rank], JobSource(recipe, people, options.watch)
    with together(comm):
        names = chosen_of(people, options.only)
        machine.refuse_unbuilt(recipe)
        done = {name for name in names if is_finished(recipe, name)}
        if recipe.run.resume == "never":
            done -= set(changed(recipe, people, names))
    here, failed = _next_generations(comm, jobs, sorted(done)) if options.watch else ([], [])
    for other in comm.gather_json(sorted(done)):
        done |= set(other)
    done -= {name for other in comm.gather_json(here) for name in other}
    left = [name for name in names if name not in done]
    if left:
        failed += _train_left(comm, jobs, options.together, left, here, node)
    return SOME_FAILED if any(comm.gather_json(len(failed))) else 0


def _next_generations(
    comm: Communicator, jobs: JobSource, names: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Which of those that are finished on this rank's disk have a next generation, and which failed. Collective.

    One rank after the other, for ranks may share a disk.
    """
    begun, failed = [], []
    for rank in range(comm.size):
        base = sampled_digest(jobs.recipe.model.path) if rank == comm.rank and names else ""
        for name in names if rank == comm.rank else ():
            try:
                why = jobs.other_base(name, base)
                if why is None and jobs.prepare(name):
                    begun.append(name)
                    tell_overseer(name, state=WAITING)
                elif why := why or jobs.other_recipe(name):
                    tell_overseer(name, state=CHANGED, note=why)
            except (EmpireError, OSError) as error:
                failed.append(name)
                tell_overseer(name, state=FAILED, note=str(error))
        comm.gather_json(None)
    return begun, failed


def _train_left(
    comm: Communicator, jobs: JobSource, most: int, left: Sequence[str], here: Sequence[str], node: Node
) -> list[str]:
    """Train this worker's part of those that are `left`; those that failed. `here`: what only this disk has."""
    recipe = jobs.recipe
    begun = {n: place_of(jobs.of(n), node.name) for n in left}
    kept = {name: place for name, place in begun.items() if place is not None}
    # An interrupted daughter needs its own place, also where fewer are left: rows stand in the order of places.
    wanted = max(len(left), 1, *(place + 1 for place in kept.values()))
    with together(comm):
        capacity = machine.capacity_for(recipe, node, min(most, wanted))
        for line in machine.notes_on(recipe) if comm.rank == 0 else ():
            print(line)
    weights = {name: machine.data_bytes(jobs.people, name) for name in left}
    places = comm.gather_json(capacity.places)
    homes = homes_of(comm.gather_json(sorted({*kept, *here})))
    mine = deal(left, comm.broadcast_json(weights), places, homes)[comm.rank]
    print(
        f"{node.name}: {len(mine)} of {len(left)} daughters, up to {capacity.places} together "
        f"({amount(capacity.plan.ledgers[0].peak)} of {amount(capacity.plan.limits[0])})"
    )
    for name in mine:
        tell_overseer(name, machine=node.name)
    return machine.train_adapters(recipe, jobs, mine, node, capacity, tell_overseer) if mine else []


def tell_overseer(name: str, **fields: object) -> None:
    """Let the overseer know; it is gone where the pipe is closed, and then so are we."""
    try:
        print(event(name, **fields), flush=True)
    except BrokenPipeError:
        os._exit(75)
