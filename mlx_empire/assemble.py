"""What the verbs have in common: from a recipe and the ranks to nodes, model, data and plan, the same on all ranks.

Rank 0 reads what only it may have (recipe, hostfile, the model's configuration) and broadcasts it; errors that a
user can mend are agreed on, said once, and end all ranks with the same exit code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_empire.checkpoint.distribute import fill_from_own, fill_from_root
from mlx_empire.checkpoint.folder import has_weights, open_folder
from mlx_empire.checkpoint.freeze import verify
from mlx_empire.checkpoint.source import FolderSource, RandomSource, WeightSource
from mlx_empire.checkpoint.tuned_source import TunedSource
from mlx_empire.cluster.hostfile import Node, load_hostfile
from mlx_empire.cluster.machine import measure_this_machine
from mlx_empire.cluster.match import find_hostfile, match_ranks
from mlx_empire.comm.failure import together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.data.dataset import Dataset
from mlx_empire.data.encode import load_tokenizer
from mlx_empire.data.share import shared_splits
from mlx_empire.data.splits import Splits, load_splits
from mlx_empire.engine.store import ShardStore
from mlx_empire.errors import UserError
from mlx_empire.evaluate.evaluator import Decode, Evaluator, from_json, to_json
from mlx_empire.evaluate.gate import GateKeeper
from mlx_empire.evaluate.generation import refuse_too_large
from mlx_empire.evaluate.questions import Questions, load_questions
from mlx_empire.model.target import Target, make_target, refuse_impossible
from mlx_empire.optim.schedule import LearningRate
from mlx_empire.plan import catalog
from mlx_empire.plan.config import read_config
from mlx_empire.plan.describe import compute_dtype
from mlx_empire.plan.model import ModelSpec
from mlx_empire.plan.resolve import RunPlan
from mlx_empire.recipe.evaluation import HELD_OUT_LOSS
from mlx_empire.recipe.load import dump_recipe, load_recipe, parse_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.metrics import read_metrics


def share_recipe(comm: Communicator, path: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe that rank 0 reads, on every rank."""
    text = None
    with together(comm):
        if comm.rank == 0:
            text = dump_recipe(load_recipe(path, overrides))
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


def share_config(comm: Communicator, recipe: Recipe) -> dict[str, Any]:
    """The model's configuration from rank 0's folder; a random model may come from the catalog instead."""
    config = None
    with together(comm):
        if comm.rank == 0:
            name = recipe.model.architecture
            if name is not None and recipe.model.init == "random" and not recipe.model.path.exists():
                config, _ = catalog.load(name)
            else:
                config = read_config(recipe.model.path)
    shared = comm.broadcast_json(config)
    assert isinstance(shared, dict)
    return shared


def build(comm: Communicator, recipe: Recipe, config: Mapping[str, Any]) -> Target:
    """The model, lazily, settled for its folder and tuned as asked, and its description."""
    folder, digest = recipe.model.path, recipe.model.base_digest
    stored = None
    with together(comm):
        if digest is not None and (comm.rank == 0 or has_weights(folder)):
            verify(folder, digest)
        if comm.rank == 0 and recipe.model.init == "pretrained":
            stored = open_folder(folder).stored()
    stored = comm.broadcast_json(stored)
    with together(comm):
        dtype = compute_dtype(config, recipe.model.dtype)
        built = make_target(config, recipe.tuning, str(folder), dtype, stored)
        refuse_impossible(built.spec)
    return built


def share_data(comm: Communicator, recipe: Recipe, spec: ModelSpec) -> Splits:
    """Training and validation rows, the same on every rank."""
    data, folder = recipe.data, recipe.model.path
    tokenizer = data.format == "tokens" or folder.is_dir()
    return shared_splits(comm, lambda: load_data(recipe, spec), available=data.path.exists() and tokenizer)


def load_data(recipe: Recipe, spec: ModelSpec) -> Splits:
    """Training and validation rows, as this machine has them."""
    data = recipe.data
    return load_splits(
        path=data.path,
        format=data.format,
        sequence_length=data.sequence_length,
        packing=data.packing,
        mask_prompt=data.mask_prompt,
        validation_split=data.validation_split or 0.0,
        tokenizer_folder=recipe.model.path,
        vocab_size=int(spec.text_config["vocab_size"]),
    )


def share_evaluator(comm: Communicator, recipe: Recipe, spec: ModelSpec, plan: RunPlan) -> Evaluator | None:
    """What scores the recipe's evaluation sets, which rank 0 reads; None where there are none. Collective."""
    length = recipe.data.sequence_length
    if not recipe.evaluation.sets:
        return None
    raw, decode, ends = None, None, None
    with together(comm):
        if recipe.evaluation.generates:
            refuse_too_large(plan, spec, length)
        if comm.rank == 0:
            sets, decode, ends = _read_sets(recipe, spec)
            raw = to_json(sets)
    raw, ends = comm.broadcast_json(raw), comm.broadcast_json(ends)
    return Evaluator(from_json(raw), length, recipe.batch.micro_size, ends, decode)


def load_evaluator(recipe: Recipe, spec: ModelSpec, plan: RunPlan) -> Evaluator | None:
    """As `share_evaluator`, for a machine alone."""
    length = recipe.data.sequence_length
    if not recipe.evaluation.sets:
        return None
    if recipe.evaluation.generates:
        refuse_too_large(plan, spec, length)
    sets, decode, ends = _read_sets(recipe, spec)
    return Evaluator(sets, length, recipe.batch.micro_size, ends, decode)


def _read_sets(recipe: Recipe, spec: ModelSpec) -> tuple[list[Questions], Decode | None, list[int]]:
    """The evaluation sets, and where answers are generated what makes text of tokens and which tokens end an answer."""
    folder, vocabulary = recipe.model.path, int(spec.text_config["vocab_size"])
    sets = [
        load_questions(one, folder, recipe.data.sequence_length, vocabulary) for one in recipe.evaluation.sets
    ]
    if not recipe.evaluation.generates:
        return sets, None, []
    tokenizer = load_tokenizer(folder)
    return sets, tokenizer.decode, sorted(map(int, tokenizer.eos_token_ids))


def gate_keeper(comm: Communicator, recipe: Recipe) -> GateKeeper:
    """What watches the recipe's gate, told of the evaluations before a run was resumed. Collective."""
    folder = recipe.run.dir
    records = read_metrics(folder) if comm.rank == 0 and (folder / "metrics.jsonl").exists() else []
    return GateKeeper(
        recipe.evaluation.stop_when, comm.broadcast_json([r for r in records if "eval_loss" in r])
    )


def pace(recipe: Recipe, data: Dataset) -> tuple[int, float]:
    """(counted tokens per step on average, steps per epoch): what durations are measured in."""
    epochs = len(data) / recipe.batch.global_size
    return max(round(data.tokens_per_epoch / epochs), 1), epochs


def total_steps(recipe: Recipe, splits: Splits) -> int:
    """`run.steps` in optimizer steps."""
    return recipe.run.steps.to_steps(None, *pace(recipe, splits.train))


def refuse_idle_keys(recipe: Recipe, splits: Splits) -> None:
    """UserError for an evaluation that was asked for and could never happen."""
    gate = recipe.evaluation.stop_when
    if gate is not None and gate.metric == HELD_OUT_LOSS and splits.valid is None:
        raise UserError(
            f"evaluation.stop_when: {HELD_OUT_LOSS}: there is no validation data to measure it on"
        )
    if recipe.run.eval_every is not None and splits.valid is None and not recipe.evaluation.sets:
        raise UserError(
            f"run.eval_every: {recipe.run.eval_every}: there is no validation data; add a valid.jsonl to data.path "
            "or set data.validation_split"
        )


def learning_rate_of(
    recipe: Recipe, steps: int, tokens_per_step: int, steps_per_epoch: float
) -> LearningRate:
    """The schedule over `steps` steps."""
    s = recipe.schedule
    warmup = s.warmup.to_steps(steps, tokens_per_step, steps_per_epoch)
    return LearningRate(s.type, recipe.optimizer.learning_rate, warmup, steps, s.final)


def load_weights(comm: Communicator, recipe: Recipe, built: Target, store: ShardStore) -> bool:
    """Fill the shards from the model's folder, or at random; True if rank 0 alone had the folder. Collective."""
    folder, seed = recipe.model.path, recipe.run.seed

    def tuned(base: WeightSource) -> WeightSource:
        return base if built.adapters is None else TunedSource(base, built.spec, seed, built.packing)

    if recipe.model.init == "random":
        fill_from_own(store, tuned(RandomSource(built.rebuild, built.base, seed)))
        return False
    everywhere = all(comm.gather_json(has_weights(folder)))
    source = None
    with together(comm):
        if everywhere or comm.rank == 0:
            source = tuned(FolderSource(folder, built.rebuild, built.base))
    if everywhere:
        assert source is not None
        fill_from_own(store, source)
    else:
        fill_from_root(store, built.spec, source, comm)
    return not everywhere
