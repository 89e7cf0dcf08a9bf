"""What capacity says of machines alone, without a recipe: what they can train, or a federation of models on them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from mlx_empire.capacity.text import capacity_console
from mlx_empire.cluster.hostfile import Node, load_hostfile
from mlx_empire.cluster.machine import measure_this_machine
from mlx_empire.cluster.match import planned_nodes
from mlx_empire.comm.failure import guard
from mlx_empire.errors import DoesNotFitError, UserError
from mlx_empire.model import catalog


def machines_command(options: argparse.Namespace) -> int:
    """What the command line asks for; returns the exit code."""
    with guard(None):
        nodes = planned_nodes(load_hostfile(options.hosts), measure_this_machine())
        return _federation(options, nodes) if options.federation is not None else _what(options, nodes)
    raise AssertionError("guard always leaves")


def _federation(options: argparse.Namespace, nodes: Sequence[Node]) -> int:
    from mlx_empire.capacity.federation import federation_document, federation_of, print_federation, read_file

    survey = federation_of(read_file(options.federation), nodes)
    if options.json:
        print(json.dumps(federation_document(survey), indent=1))
    else:
        print_federation(survey, capacity_console(sys.stdout))
    return DoesNotFitError.exit_code if survey.federation.hot_without_room else 0


def _what(options: argparse.Namespace, nodes: Sequence[Node]) -> int:
    from mlx_empire.capacity.what import hours_of, print_what, what, what_document

    names = [name for name in catalog.names() if options.what.lower() in name]
    if not names:
        nearest = catalog.nearest(options.what)
        raise UserError(f"--what {options.what[:60]}: in no name of the catalog; did you mean {nearest}?")
    deadline = hours_of(options.deadline) if options.deadline is not None else None
    survey = what(nodes, names, options.tokens, deadline, options.budget, options.settings)
    if options.json:
        print(json.dumps(what_document(survey), indent=1))
    else:
        print_what(survey, capacity_console(sys.stdout))
    return 0
