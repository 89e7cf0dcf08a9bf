"""Say what every machine will need, before a byte is allocated: what `command` asks for, as text, JSON and a page.

Exit code 0 where it fits (also tightly), 3 where it does not. Under mpirun every node reports its own limits; otherwise
the hostfile's are taken, and without a hostfile those of this machine.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from socket import gethostname
from typing import TypeVar

from rich.console import Console

from mlx_empire.capacity.advice import advise
from mlx_empire.capacity.command import DAUGHTERS
from mlx_empire.capacity.daughter_document import DaughterSurvey, daughters_document
from mlx_empire.capacity.daughters import LORA, WAYS, daughter_runs, serving, tuned_in
from mlx_empire.capacity.disks import disk_advice
from mlx_empire.capacity.document import CapacityReport, Document, report_document
from mlx_empire.capacity.ladder import UNLOCKED, ladder
from mlx_empire.capacity.matrix import compare, matrix, read_rows
from mlx_empire.capacity.survey_document import LadderSurvey, MatrixSurvey, ladder_document, matrix_document
from mlx_empire.capacity.synthetic import SyntheticSurvey, print_synthetic, synthetic, synthetic_document
from mlx_empire.capacity.teacher import teacher_pass
from mlx_empire.capacity.text import (
    capacity_console,
    print_daughters,
    print_ladder,
    print_matrix,
    print_report,
)
from mlx_empire.capacity.when import size_of
from mlx_empire.cluster.hostfile import Node, load_hostfile
from mlx_empire.cluster.machine import Calibration, calibrate, measure_this_machine
from mlx_empire.cluster.match import find_hostfile, planned_nodes
from mlx_empire.comm.connect import connect
from mlx_empire.comm.environment import under_mpirun
from mlx_empire.comm.failure import guard, together
from mlx_empire.comm.protocol import Communicator
from mlx_empire.data.files import files_there
from mlx_empire.errors import DoesNotFitError, UserError
from mlx_empire.formats.hf_folder import stored_if_whole
from mlx_empire.model import catalog
from mlx_empire.model.spec import ModelSpec
from mlx_empire.model.target import Target, catalog_target, planned_target
from mlx_empire.optim.choose import state_bytes_of
from mlx_empire.plan.assess import Assessment, assess
from mlx_empire.plan.chips import no_time
from mlx_empire.plan.disk import DiskLedger, Places
from mlx_empire.plan.hardware import WIRES, wire_named, wire_of
from mlx_empire.plan.lengths import DataSize, Lengths
from mlx_empire.plan.pace import chips_of, cloud_of, pace_of, timeline_of
from mlx_empire.plan.wired_limit import untouched
from mlx_empire.recipe.changes import EVERY_WEIGHT, variant
from mlx_empire.recipe.schema import Recipe
from mlx_empire.recipe.text import read_small_text
from mlx_empire.report.html import refuse_unwritable_files, write_file
from mlx_empire.report.trace import trace_document
from mlx_empire.run.agree import share_nodes, share_recipe
from mlx_empire.run.apart import refuse_mixed
from mlx_empire.run.disks import ledgers_of, planned_places, seen_places, what_else
from mlx_empire.run.parent import read_parent

Found = TypeVar("Found")
MOST_CSV_BYTES = 1 << 20


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for beside the recipe and its changes."""

    hosts: Path | None = None
    part: str = "report"
    compare: Path | None = None
    as_json: bool = False
    page: Path | None = None
    count: int = DAUGHTERS
    wire: str | None = None
    calibrate: bool = False
    trace: Path | None = None
    unit: Path | None = None


def answer_command(options: argparse.Namespace) -> int:
    """What the command line asks for; returns the exit code."""
    with guard(None):
        comm = connect()
    with guard(comm):
        wanted = Wanted(
            options.hosts,
            options.parts[0],
            options.compare,
            options.json,
            options.html,
            options.count,
            options.wire,
            options.calibrate,
            options.trace,
            options.unit,
        )
        return answer(comm, options.recipe, options.overrides, wanted)
    raise AssertionError("guard always leaves")


def answer(comm: Communicator, recipe_path: Path, overrides: Sequence[str], wanted: Wanted) -> int:
    """Print what is wanted, on rank 0; the exit code, on every rank."""
    recipe = share_recipe(comm, recipe_path, overrides)
    nodes = nodes_of(comm, recipe, wanted.hosts)
    places = (
        seen_places(comm, recipe, nodes) if under_mpirun() else planned_places(recipe, nodes, gethostname())
    )
    code = None
    with together(comm):
        if comm.rank == 0:
            refuse_mixed(recipe, comm.rank, comm.hostname)
            refuse_sources(recipe, recipe_path, wanted)
            code = present(recipe, nodes, places, wanted)
    return int(comm.broadcast_json(code))


def nodes_of(comm: Communicator, recipe: Recipe, hosts: Path | None) -> list[Node]:
    """What each rank has: as measured under mpirun, else as the hostfile says, else this machine."""
    if under_mpirun():
        return share_nodes(comm, recipe, hosts)
    file = find_hostfile(recipe.run.hosts, hosts)
    own = measure_this_machine()
    return planned_nodes(load_hostfile(file), own) if file is not None else [own]


def refuse_sources(recipe: Recipe, recipe_path: Path, wanted: Wanted) -> None:
    """UserError where a file that is to be written cannot be, or is read for the answer."""
    hosts = find_hostfile(recipe.run.hosts, wanted.hosts)
    sources = [recipe_path, hosts, wanted.compare, wanted.unit, *files_there(recipe.data.paths)]
    refuse_unwritable_files({"--html": wanted.page, "--trace": wanted.trace}, sources)


def present(recipe: Recipe, nodes: Sequence[Node], places: Places, wanted: Wanted) -> int:
    """Print what is wanted and write the page; the exit code."""
    report = cache(
        lambda: report_of(recipe, nodes, places, wanted)
    )  # a part is made once, where it is asked for
    matrix = cache(lambda: matrix_of(recipe, nodes, wanted))
    ladder = cache(lambda: ladder_of(recipe, nodes))
    daughters = cache(lambda: daughters_of(recipe, nodes, wanted))
    if wanted.page is not None:
        from mlx_empire.capacity.page import capacity_page  # the other answers need no templates

        page = capacity_page(report(), matrix(), ladder(), daughters(), command())
        write_file("--html", wanted.page, page)
    if wanted.part == "matrix":
        show_part(matrix(), wanted, matrix_document, print_matrix)
    elif wanted.part == "ladder":
        show_part(ladder(), wanted, ladder_document, print_ladder)
    elif wanted.part == "daughters":
        show_part(daughters(), wanted, daughters_document, print_daughters)
    elif wanted.part == "synthetic":
        show_part(synthetic_of(recipe, nodes, wanted), wanted, synthetic_document, print_synthetic)
    else:
        show_part(report(), wanted, report_document, print_report)
        return DoesNotFitError.exit_code if report().verdict == "no" else 0
    return 0


def show_part(
    found: Found,
    wanted: Wanted,
    document: Callable[[Found], Document],
    show: Callable[[Found, Console], None],
) -> None:
    """Print a part: as JSON, or for a person."""
    if wanted.as_json:
        print(json.dumps(document(found), indent=1))
    else:
        show(found, capacity_console(sys.stdout))


def report_of(recipe: Recipe, nodes: Sequence[Node], places: Places, wanted: Wanted) -> CapacityReport:
    """The report of the recipe on the nodes."""
    target = planned_target(recipe, stored_if_whole)
    if recipe.tuning.start is not None:
        read_parent(recipe, target, base=None)
    assessment = assess(recipe, target.spec, nodes, state_bytes_of)
    size, counted = size_of(recipe, target.spec)
    known = size is not None or recipe.run.steps.unit == "steps"
    lengths = Lengths.of(recipe, size or DataSize.assumed(recipe))
    steps = lengths.steps if known else None

    def retuned(changed: Recipe) -> Target:
        same = changed.tuning == recipe.tuning
        return target if same else planned_target(changed, stored_if_whole)

    def disks_of(one: Assessment, tuned: Target) -> tuple[DiskLedger, ...]:
        beside = what_else(one.recipe, tuned)
        return ledgers_of(one.recipe, tuned, one.plan, places, steps, beside)

    def again(changed: Recipe) -> tuple[str, tuple[DiskLedger, ...]]:
        tuned = retuned(changed)
        other = assess(changed, tuned.spec, nodes, state_bytes_of)
        return other.verdict, disks_of(other, tuned)

    disks = disks_of(assessment, target)
    measured = calibration_of(target, wanted)
    wire = wire_named(wanted.wire) if wanted.wire else wire_of(nodes)
    others = [other for other in WIRES if other.name != wire.name and len(nodes) > 1]
    unknown = no_time(nodes, measured)
    known_chips = None if unknown else chips_of(assessment, None, measured)
    over = (wire, *others) if known_chips else ()
    paces = tuple(pace_of(assessment, one, known_chips, None, size) for one in over)
    advice = advise(assessment, wire, calibration=measured, retuned=lambda changed: retuned(changed).spec)
    if assessment.verdict != "no":
        advice = [*disk_advice(recipe, disks, again), *advice]
    cloud = cloud_of(assessment, lengths, paces[0] if paces else None)
    if wanted.trace is not None:
        if known_chips is None:
            raise UserError(f"--trace {wanted.trace}: {unknown}")
        events = timeline_of(assessment, wire, known_chips, 1).events
        names = [node.name for node in nodes]
        write_file("--trace", wanted.trace, json.dumps(trace_document({"predicted": events}, names)))
    now = datetime.now()
    alone = untouched_verdict(assessment)
    return CapacityReport(
        assessment,
        target.not_trainable,
        paces,
        advice,
        cloud,
        known_chips or (),
        now,
        disks,
        counted,
        alone,
        unknown,
        teacher_pass(recipe, nodes, wire, known_chips, size),
    )


def untouched_verdict(assessment: Assessment) -> str | None:
    """The verdict with the limits that macOS has by itself; None where the plan assumes no higher ones."""
    nodes = [one.node for one in assessment.nodes]
    own = [untouched(node) for node in nodes]
    if own == nodes:
        return None
    return assess(assessment.recipe, assessment.spec, own, assessment.states_of).verdict


def matrix_of(recipe: Recipe, nodes: Sequence[Node], wanted: Wanted) -> MatrixSurvey:
    """The recipe with every model of the catalog, on the four clusters; of --hosts where that is asked for."""
    theirs = read_rows(*text_of(wanted.compare)) if wanted.compare is not None else None
    everywhere = for_any_nodes(recipe)
    if everywhere.tuning.type == "full":  # parts and rounding are the recipe's own model's
        everywhere = variant(everywhere, EVERY_WEIGHT)
    targets = (in_matrix(name, everywhere) for name in catalog.names())
    models = ((target.spec, target.not_trainable) for target in targets)
    own = wanted.part == "matrix" and wanted.hosts is not None
    clusters = {wanted.hosts.stem: nodes} if own and wanted.hosts is not None else None
    found = matrix(everywhere, models, state_bytes_of, clusters)
    return MatrixSurvey(found, compare(found, theirs) if theirs is not None else None)


def ladder_of(recipe: Recipe, nodes: Sequence[Node]) -> LadderSurvey:
    """The recipe's model on the nodes, one technique after the other."""
    target, unlocked = planned_target(recipe, stored_if_whole), variant(recipe, UNLOCKED)
    others = (catalog_target(name, unlocked) for name in catalog.names())
    trainable = (other.spec for other in others if other.not_trainable is None)
    return LadderSurvey(target.spec.name, ladder(recipe, target.spec, nodes, trainable, state_bytes_of))


def daughters_of(recipe: Recipe, nodes: Sequence[Node], wanted: Wanted) -> DaughterSurvey:
    """Small models of the recipe's one: training, serving and placing them."""
    alone = for_any_nodes(recipe)
    targets = {way: planned_target(tuned_in(alone, way), stored_if_whole) for way in WAYS}
    specs, first = {way: target.spec for way, target in targets.items()}, targets[LORA]
    measured = calibration_of(first, wanted)
    size, _ = size_of(recipe, first.spec)
    runs = daughter_runs(alone, specs, nodes, state_bytes_of, measured, size)
    served = serving(alone, specs, nodes, calibration=measured)
    return DaughterSurvey(first.spec.name, first.not_trainable, runs, served, nodes, wanted.count)


def synthetic_of(recipe: Recipe, nodes: Sequence[Node], wanted: Wanted) -> SyntheticSurvey:
    """What synthetic data takes for the recipe's model, by intention."""
    own = planned_target(recipe, stored_if_whole)
    wire, measured = wire_named(wanted.wire) if wanted.wire else wire_of(nodes), calibration_of(own, wanted)

    def spec_of(changed: Recipe) -> ModelSpec:
        return planned_target(changed, stored_if_whole).spec

    return synthetic(recipe, spec_of, nodes, wire, measured, own.not_trainable)


def in_matrix(name: str, recipe: Recipe) -> Target:
    """A catalog model as the recipe tunes it; without the recipe's targets where it has no such modules."""
    try:
        return catalog_target(name, recipe)
    except UserError as error:
        freely = variant(recipe, {"tuning.targets": None, "tuning.layers": None})
        return replace(catalog_target(name, freely), not_trainable=str(error))


def calibration_of(target: Target, wanted: Wanted) -> Calibration | None:
    """What this machine does in the target's dtype, if that is to be measured or was (`run.unit`)."""
    if wanted.unit is not None:
        # It trains, which no other plan needs.
        from mlx_empire.run.unit import calibration_from

        return calibration_from(wanted.unit, target.spec)
    return calibrate(target.spec.dtype) if wanted.calibrate else None


def for_any_nodes(recipe: Recipe) -> Recipe:
    """The recipe without shares that were written for certain ranks."""
    listed = not isinstance(recipe.memory.shares, str)
    return variant(recipe, {"memory.shares": "memory"}) if listed else recipe


def text_of(path: Path) -> tuple[str, str]:
    """(text, path) of the file to compare with. UserError."""
    remedy = "--compare takes a CSV file with the columns model,1K+3S,..."
    return read_small_text(path, "matrix", MOST_CSV_BYTES, remedy), str(path)


def command() -> str:
    """What was typed, for the page's last line."""
    words = sys.argv[1:] if sys.argv[1:2] != ["capacity"] else sys.argv[2:]
    return shlex.join(["mlx-empire", "capacity", *words])
