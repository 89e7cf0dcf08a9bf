"""Every model that was named, one after the other: planned, loaded and streamed as in training, and asked.

Weights are frozen but for adapters, which are small: so nothing is held for gradients or an optimizer, and a model
needs little more than its weights, over as many machines as it takes.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence

import mlx.core as mx
from rich.console import Console

from mlx_empire.checkpoint.manifest import sampled_digest
from mlx_empire.cluster.hostfile import Node
from mlx_empire.cluster.match import find_hostfile
from mlx_empire.comm.connect import connect
from mlx_empire.comm.failure import guard, together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.comm.thread import CommThread
from mlx_empire.data.encode import load_tokenizer
from mlx_empire.evaluate.document import Scored, changed_document, score_table, worded
from mlx_empire.evaluate.named import recipes_of
from mlx_empire.evaluate.page import evaluation_page
from mlx_empire.evaluation.questions import files_of_set
from mlx_empire.formats.hf_folder import has_weights
from mlx_empire.formats.staging import disk_errors
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.wired_limit import fitting_plan
from mlx_empire.recipe.load import dump_recipe, parse_recipe
from mlx_empire.recipe.schema import Recipe
from mlx_empire.report.html import refuse_unwritable_files
from mlx_empire.run.agree import (
    agree_on_model,
    share_config,
    share_evaluator,
    share_nodes,
    share_target,
    standing,
)
from mlx_empire.run.caffeinate import keep_awake
from mlx_empire.run.forward_only import frozen
from mlx_empire.run.parent import share_parent
from mlx_empire.run.proof import share_proof
from mlx_empire.run.trainer import explaining_memory, limit_memory, load_weights, make_trainer


def evaluate_command(options: argparse.Namespace) -> int:
    """What the command line asks for; returns the exit code."""
    with guard(None):
        comm = connect()
    with guard(comm):
        keep_awake()
        told = None
        with together(comm):
            if comm.rank == 0:
                asked = recipes_of(options, comm.size)
                sets = [
                    file for recipe in asked for one in recipe.evaluation.sets for file in files_of_set(one)
                ]
                sources = [find_hostfile(asked[0].run.hosts, options.hosts), *sets]
                refuse_unwritable_files({"--json": options.json, "--html": options.html}, sources)
                told = [dump_recipe(recipe) for recipe in asked]
        recipes = [parse_recipe(text, str(options.named)) for text in comm.broadcast_json(told)]
        names = [str(options.named)] if len(recipes) == 1 else [options.against, str(options.named)]
        with standing(comm, recipes[0]):
            nodes = share_nodes(comm, recipes[0], options.hosts)
            found = [scored(comm, name, recipe, nodes) for name, recipe in zip(names, recipes, strict=True)]
        with together(comm):
            if comm.rank == 0:
                report_scores(options, found)
    return 0


def scored(comm: Communicator, name: str, recipe: Recipe, nodes: Sequence[Node]) -> Scored:
    """The scores of one model; its rows on rank 0 alone. Collective."""
    agree_on_model(comm, recipe)
    config = share_config(comm, recipe)
    target = frozen(share_target(comm, recipe, config))
    parent = share_parent(comm, recipe, target, _digest(recipe) if comm.rank == 0 else None)
    target = share_proof(comm, recipe, config, target)
    with together(comm):
        plan = fitting_plan(recipe, target.spec, nodes, state_bytes_of(recipe.optimizer))
    evaluator = share_evaluator(comm, recipe, target.spec, plan)
    assert evaluator is not None, "recipes_of asks for sets"
    with together(comm):
        limit_memory(plan, comm.rank, recipe.memory.wired, nodes[comm.rank])
    with explaining_memory(plan, comm.rank), CommThread() as thread:
        trainer = make_trainer(comm, thread, recipe, target, plan)
        load_weights(comm, recipe, target, trainer.store, parent)
        trainer.prepare(packing=False)
        most = max(plan.work.micro_batches(rank) for rank in range(comm.size))
        scores, rows = evaluator.measure(trainer, comm, max(most, 1))
    del trainer
    gc.collect()
    mx.clear_cache()
    words: dict[str, list[dict[str, object]]] = {}
    with together(comm):
        if comm.rank == 0:
            decode = load_tokenizer(recipe.model.path).decode
            words = {one.title: worded(one, rows[one.title], decode) for one in evaluator.sets}
    return Scored(name, scores, words)


def _digest(recipe: Recipe) -> str | None:
    """What an adapter's plan.json would say of this base."""
    folder = recipe.model.path
    return sampled_digest(folder) if recipe.tuning.start is not None and has_weights(folder) else None


def report_scores(options: argparse.Namespace, found: Sequence[Scored]) -> None:
    """The table, and the files that were asked for. UserError where one cannot be written."""
    document = changed_document(found)
    Console().print(score_table(document))
    for line in document["told"]:
        print(line)
    if options.json is not None:
        with disk_errors(options.json):
            options.json.write_text(
                json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
    if options.html is not None:
        with disk_errors(options.html):
            options.html.write_text(evaluation_page(document) + "\n", encoding="utf-8")
