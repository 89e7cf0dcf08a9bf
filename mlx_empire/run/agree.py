"""What rank 0 reads and all ranks get, and what the ranks must have in common before anything is allocated.

Rank 0 reads what only it may have (recipe, hostfile, the model's configuration, evaluation sets) and broadcasts it;
errors that a user can mend are agreed on, said once, and end all ranks with the same exit code.

What stands guard over a run until it ends (`standing`): the watchdog, collectives that give right answers, one run per
folder. The rows that all train on are `shared_rows`' business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_empire import progress
from mlx_empire.cluster.hostfile import Node, load_hostfile
from mlx_empire.cluster.machine import measure_this_machine
from mlx_empire.cluster.match import find_hostfile, match_ranks
from mlx_empire.comm.checks import Facts, environment, self_test, shake_hands
from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.watchdog import Watchdog
from mlx_empire.data.encode import load_tokenizer
from mlx_empire.data.rows import Rows
from mlx_empire.errors import EmpireError
from mlx_empire.evaluation.gate import GateKeeper
from mlx_empire.formats.fetched import naming_the_fetch, refuse_other_source
from mlx_empire.formats.hf_folder import has_weights, model_digest, open_folder
from mlx_empire.formats.seal import check_sealed
from mlx_empire.model.attention.fused import allow_sinks
from mlx_empire.model.build import compute_dtype
from mlx_empire.model.config import read_config
from mlx_empire.model.spec import ModelSpec
from mlx_empire.model.target import Target, make_target, refuse_impossible, refuse_other_architecture
from mlx_empire.model.unread import refuse_row_length
from mlx_empire.plan.shares import RunPlan
from mlx_empire.recipe.evaluation import Gate
from mlx_empire.recipe.explain import leaf_fields
from mlx_empire.recipe.load import MAX_BYTES, dump_recipe, load_recipe, parse_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.recipe.text import read_small_text
from mlx_empire.report.metrics import read_metrics
from mlx_empire.run.lock import RunLock

if TYPE_CHECKING:
    from mlx_empire.evaluation.evaluator import Evaluator
    from mlx_empire.evaluation.reading import RowReader


class Safeguards:
    """What stands guard until the run ends; `notes` are for the user once there is a report."""

    def __init__(self, comm: Communicator, stack: ExitStack) -> None:
        self._comm, self._stack = comm, stack
        self.notes: list[str] = []

    def lock(self, folder: Path) -> None:
        """Hold the run's folder from here on. UserError naming the holder if another run does. Collective."""
        with together(self._comm):
            if self._comm.rank == 0:
                held = self._stack.enter_context(RunLock(folder))
                self.notes += [held.note] if held.note else []


@contextmanager
def standing(comm: Communicator, recipe: Recipe) -> Iterator[Safeguards]:
    """The safeguards of a run, from its first collective to its end. Collective."""
    with ExitStack() as stack:
        stack.enter_context(Watchdog(comm, recipe.comm.deadline_seconds, recipe.comm.deadline_floor_seconds))
        self_test(comm)
        progress.reach("start")
        yield Safeguards(comm, stack)


def greet(comm: Communicator, recipe_path: Path, overrides: Sequence[str]) -> None:
    """UserError with a table where ranks differ in what they run or in what they were asked for. Collective.

    Rank 0's recipe is the one that counts; another rank's file at the same path must ask for the same, so that an
    old copy is noticed. A rank without the file does not mind.
    """
    shake_hands(comm, environment(), "install the same versions on every machine (`make setup`)")
    text = _text(recipe_path)
    digest = None if text is None else hashlib.sha256(text.encode()).hexdigest()
    known = [answer for answer in comm.gather_json([digest, *overrides]) if answer[0] is not None]
    if any(answer != known[0] for answer in known):
        remedy = f"copy {recipe_path} to every machine again and start all ranks with one command line"
        shake_hands(comm, _asked_for(recipe_path, overrides), remedy)


def share_recipe(
    comm: Communicator,
    path: Path,
    overrides: Sequence[str],
    read: Callable[[Path, Sequence[str]], Recipe] = load_recipe,
) -> Recipe:
    """The recipe that rank 0 reads, on every rank."""
    text = None
    with together(comm):
        if comm.rank == 0:
            text = dump_recipe(read(path, overrides))
    return parse_recipe(comm.broadcast_json(text), str(path))


def share_nodes(comm: Communicator, recipe: Recipe, hosts: Path | None) -> list[Node]:
    """What each rank may use: its line of the hostfile where there is one, completed by its own measurement."""
    measured = [Node(**fields) for fields in comm.gather_json(asdict(measure_this_machine()))]
    nodes: list[dict[str, Any]] | None = None
    with together(comm):
        if comm.rank == 0:
            file = find_hostfile(recipe.run.hosts, hosts)
            cluster = load_hostfile(file) if file is not None else None
            nodes = [asdict(node) for node in match_ranks(cluster, comm.hostnames, measured)]
    return [Node(**fields) for fields in comm.broadcast_json(nodes)]


def agree_on_model(comm: Communicator, recipe: Recipe) -> None:
    """UserError naming a rank whose model is damaged, or with a table where ranks have different ones. Collective."""
    folder, fact = recipe.model.path, None
    with together(comm):
        if recipe.model.init == "pretrained" and has_weights(folder):
            with naming_the_fetch(recipe):
                fact = model_digest(folder, contents=recipe.model.compare == "contents")[:16]
    shake_hands(comm, {"model digest": fact}, f"copy {folder} to every machine again")


def share_config(comm: Communicator, recipe: Recipe) -> dict[str, Any]:
    """The model's configuration from rank 0's folder; a random model may come from the catalog instead."""
    config = None
    with together(comm):
        if comm.rank == 0:
            name = recipe.model.architecture
            if name is not None and recipe.model.init == "random" and not recipe.model.path.exists():
                # Nearly all models come from a folder.
                from mlx_empire.model import catalog

                config, _ = catalog.load(name)
            else:
                with naming_the_fetch(recipe):
                    config = read_config(recipe.model.path)
                refuse_other_source(recipe)
                refuse_other_architecture(config, recipe)
    shared = comm.broadcast_json(config)
    assert isinstance(shared, dict)
    return shared


def share_target(comm: Communicator, recipe: Recipe, config: Mapping[str, Any]) -> Target:
    """The model, lazily, settled for rank 0's folder and tuned as asked. UserError where it cannot be trained here."""
    folder, digest = recipe.model.path, recipe.model.base_digest
    stored = None
    with together(comm):
        if digest is not None and (comm.rank == 0 or has_weights(folder)):
            check_sealed(folder, digest)
        if comm.rank == 0 and recipe.model.init == "pretrained":
            with naming_the_fetch(recipe):
                stored = open_folder(folder).stored()
    stored = comm.broadcast_json(stored)
    with together(comm):
        dtype = compute_dtype(config, recipe.model.dtype)
        target = make_target(config, recipe.tuning, str(folder), dtype, stored)
        refuse_impossible(target.spec)
        refuse_row_length(config, recipe.data.sequence_length, str(folder), packed=recipe.data.packing)
    allow_sinks(tensor.name for unit in target.spec.units for tensor in unit.tensors)
    return target


def share_evaluator(comm: Communicator, recipe: Recipe, spec: ModelSpec, plan: RunPlan) -> Evaluator | None:
    """What scores the recipe's evaluation sets, which rank 0 reads; None where there are none. Collective."""
    length = recipe.data.sequence_length
    if not recipe.evaluation.sets:
        return None
    # Here and below: only a run with evaluation sets loads what reads, generates and scores their answers.
    from mlx_empire.evaluation.evaluator import AskedSets, Evaluator, from_json, read_sets, to_json
    from mlx_empire.evaluation.generation import refuse_too_large

    found = None
    with together(comm):
        if recipe.evaluation.generates:
            refuse_too_large(plan, spec, length)
        if comm.rank == 0:
            found = read_sets(recipe, int(spec.text_config["vocab_size"]))
    sets = from_json(comm.broadcast_json(None if found is None else to_json(found.sets)))
    ends = comm.broadcast_json(None if found is None else list(found.ends))
    return Evaluator(found or AskedSets(sets, ends), length, recipe.batch.micro_size)


def load_evaluator(recipe: Recipe, spec: ModelSpec, plan: RunPlan) -> Evaluator | None:
    """As `share_evaluator`, for a machine alone."""
    length = recipe.data.sequence_length
    if not recipe.evaluation.sets:
        return None
    from mlx_empire.evaluation.evaluator import Evaluator, read_sets
    from mlx_empire.evaluation.generation import refuse_too_large

    if recipe.evaluation.generates:
        refuse_too_large(plan, spec, length)
    found = read_sets(recipe, int(spec.text_config["vocab_size"]))
    return Evaluator(found, length, recipe.batch.micro_size)


def make_reader(
    comm: Communicator, recipe: Recipe, spec: ModelSpec, plan: RunPlan, valid: Rows | None
) -> RowReader | None:
    """What reads held-out rows, and goes on with them where each machine has room for the model; None where nobody
    asked, or there are none. Collective."""
    if valid is None or not recipe.report.samples:
        return None
    from mlx_empire.evaluation.generation import holds_whole
    from mlx_empire.evaluation.reading import RowReader

    decode, ends = None, None
    with together(comm):
        if comm.rank == 0:
            tokenizer = load_tokenizer(recipe.model.path)
            decode = tokenizer.decode
            if holds_whole(plan, spec, recipe.data.sequence_length + 1):
                ends = sorted(map(int, tokenizer.eos_token_ids))
    return RowReader(valid, recipe.report.samples, decode, comm.broadcast_json(ends))


def share_gate(comm: Communicator, recipe: Recipe, gate: Gate | None) -> GateKeeper:
    """What watches a gate, told of the evaluations that the run made before. Collective.

    A run that goes on from an earlier adapter is to learn something: what that one had reached does not end it.
    """
    folder, first = recipe.run.dir, 0 if recipe.tuning.start is None else 1
    records = read_metrics(folder) if comm.rank == 0 and (folder / "metrics.jsonl").exists() else []
    return GateKeeper(gate, comm.broadcast_json([r for r in records if "eval_loss" in r]), first)


def _text(path: Path) -> str | None:
    """What this rank's own recipe file says; None where it has none."""
    try:
        return read_small_text(path, "recipe", MAX_BYTES, "")
    except EmpireError:
        return None


def _asked_for(path: Path, overrides: Sequence[str]) -> Facts:
    """Every key of the recipe as this rank reads it; nothing where it has no file."""
    if _text(path) is None:
        return {}
    try:
        lines = dump_recipe(load_recipe(path, overrides)).splitlines()
    except EmpireError as error:
        return {"recipe": str(error).removeprefix(f"{path}:")}
    facts: dict[str, str | None] = {"recipe": "can be used", **dict.fromkeys(leaf_fields(), "null")}
    section = ""
    for line in lines:
        key, _, value = line.partition(":")
        if key.startswith(" "):
            facts[f"{section}.{key.strip()}"] = value.strip()
        else:
            section = key
    return facts
