"""Run by mpirun: what two steps of settings give to the last bit, by whether a switch of the case is off or on."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

from oracle.plans import case_of
from oracle.settings import SETTINGS
from oracle.worker import bits_of
from support.mpi import report

from mlx_empire.comm.connect import connect
from mlx_empire.comm.failure import guard

if __name__ == "__main__":
    world = connect(bucket_bytes=8192)
    with guard(world):
        switch, more, names = (json.loads(word) for word in sys.argv[1:])
        for name in names:
            case = replace(case_of(SETTINGS[name], world.size), **more)
            report({name: [bits_of(replace(case, **{switch: on}), world) for on in (False, True)]})
